"""What looks like the faults and is none: nothing may be said."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import Cases, Guard

CASES = Cases(family="healthy")


def healthy(name: str, **more):
    return CASES.case(name, None, crashes=False, remedies=0, **more)


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def train(guard: Guard, model: nn.Module, batch: torch.Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with guard(model, optimizers=(optimizer,)):
        for _ in range(steps):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()


@healthy("in-place-activations-and-batch-norm")
def in_place_activations_and_batch_norm(guard: Guard, repaired: int) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)]
    train(guard, nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4), nn.Dropout(0.5, inplace=True)), images())


@healthy("batch-norm-twice-before-backward")
def batch_norm_twice_before_backward(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    with guard(model):
        (model(images()).sum() - model(images() + 1).square().sum()).backward()


@healthy("in-place-add-on-what-nobody-saved")
def in_place_add_on_what_nobody_saved(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            y += self.b(x)
            y.mul_(0.5)
            y[:, 0] = 0
            y.masked_fill_(y.detach() > 1, 1)
            return y

    train(guard, Net(), rows())


@healthy("write-to-a-fresh-tensor")
def write_to_a_fresh_tensor(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(3, 4).masked_fill_(x > 0, 1.0)
            mask.neg_()
            out = torch.empty(3, 4)
            torch.mul(x, 2, out=out)
            return self.fc(x) * mask + out

    train(guard, Net(), rows())


@healthy("graph-that-nobody-backpropagates")
def graph_that_nobody_backpropagates(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 4)
    with guard(model):
        metric = model(rows()).exp()
        metric.data.mul_(2)
        metric.add_(1)
        model(rows()).sum().backward()


@healthy("moving-averages-through-data")
def moving_averages_through_data(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.average = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("center", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = self.average(x)
            self.center.data.mul_(0.9).add_(target.mean(0), alpha=0.1)
            return self.fc(x) - (target - self.center.clone())

    model = Net()
    optimizer = torch.optim.Adam(model.fc.parameters())
    with guard(model, optimizers=(optimizer,)):
        for _ in range(2):
            optimizer.zero_grad()
            model(rows()).square().mean().backward()
            optimizer.step()
            for parameter, average in zip(model.fc.parameters(), model.average.parameters(), strict=True):
                average.data.mul_(0.9).add_(parameter.data, alpha=0.1)


@healthy("data-written-to-without-effect")
def data_written_to_without_effect(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc(x).sigmoid()
            hidden.data.clamp_(0, 1)
            return hidden

    train(guard, Net(), rows())


@healthy("other-columns-through-data")
def other_columns_through_data(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            memory = torch.zeros(3, 8)
            memory[:, :4] = x
            hidden = self.fc(memory[:, :4])
            memory.data[:, 4:] = 1
            return hidden

    train(guard, Net(), rows())


@healthy("numpy-reads")
def numpy_reads(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc(x).tanh()
            hidden.detach().numpy().sum()
            return hidden * torch.from_numpy(hidden.detach().numpy().copy())

    train(guard, Net(), rows())


@healthy("checkpoints-of-both-kinds")
def checkpoints_of_both_kinds(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 1)
            self.body = nn.Sequential(
                nn.Conv2d(3, 3, 3, padding=1),
                nn.BatchNorm2d(3),
                nn.ReLU(inplace=True),
                nn.Conv2d(3, 3, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Dropout(0.1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = checkpoint(self.body, self.stem(x), use_reentrant=True)
            return checkpoint(self.body, x, use_reentrant=False)

    train(guard, Net(), images())


@healthy("activations-kept-on-the-host")
def activations_kept_on_the_host(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    with guard(model), torch.autograd.graph.save_on_cpu():
        model(rows()).sum().backward()


@healthy("gradient-of-a-gradient")
def gradient_of_a_gradient(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    with guard(model):
        x = rows().clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (model(x).sum() + (grad.norm(dim=1) - 1).square().mean()).backward()


@healthy("two-losses-of-one-graph")
def two_losses_of_one_graph(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        first, second = model(rows()).unbind(1)
        first.sum().backward(retain_graph=True)
        second.sum().backward()
        optimizer.step()


@healthy("recurrent-with-state-in-a-buffer")
def recurrent_with_state_in_a_buffer(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 4, batch_first=True)
            self.register_buffer("state", torch.zeros(1, 3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, state = self.cell(x[:, None], self.state.clone())
            self.state.copy_(state.detach())
            return y

    train(guard, Net(), rows())


@healthy("custom-function-that-marks-dirty")
def custom_function_that_marks_dirty(guard: Guard, repaired: int) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            z = Double.apply(y)
            return F.softplus(y) + z

    train(guard, Net(), rows())


@healthy("transformer")
def transformer(guard: Guard, repaired: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    train(
        guard, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.linspace(-1, 1, 96).reshape(2, 6, 8)
    )


@healthy("hook-that-keeps-an-activation", source=("https://github.com/meta-pytorch/captum/issues/156",))
def hook_that_keeps_an_activation(guard: Guard, repaired: int) -> None:
    kept: list[torch.Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    train(guard, model, images())


@healthy("weights-under-autocast")
def weights_under_autocast(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with guard(model, optimizers=(optimizer,)):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = sum(model(rows()).float().square().mean() for _ in range(2))
            loss.backward()
            optimizer.step()
