"""Saved tensors that are overwritten past PyTorch's check (AMP402, AMP405, AMP409): nothing is raised."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import Cases, Guard

CASES = Cases(family="in-place")
case = CASES.case
BOTH = {"write": "write", "save": "save"}


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@case(
    "through-data",
    "AMP402",
    module="",
    marks=BOTH,
    crashes=False,
    evidence={"how": "untracked", "node": "SoftmaxBackward0", "slot": "result"},
)
def through_data(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = self.scores(x).softmax(-1)  # <- save
            if repaired:
                weights = weights.clone()
            weights.data[:, 0] = 0  # <- write
            return (weights @ weights.T).sum()

    model = Attention()
    with guard(model):
        model(rows()).backward()


@case("alias-with-its-own-version", "AMP402", module="", marks=BOTH, crashes=False, evidence={"how": "untracked"})
def alias_with_its_own_version(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.fc(x).sigmoid()  # <- save
            alias = torch.empty(0).set_((gate.clone() if repaired else gate).detach().untyped_storage())
            alias.mul_(0.5)  # <- write
            return gate.sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case(
    "numpy-array",
    "AMP402",
    module="",
    marks={"save": "save", "call": "shared"},
    crashes=False,
    evidence={"how": "outside"},
    needs=("numpy",),
)
def numpy_array(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc(x).tanh()  # <- save
            array = hidden.detach().numpy()  # <- shared
            if repaired:
                array = array.copy()
            array[0] = 3
            return hidden.sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case(
    "function-without-mark-dirty",
    "AMP402",
    module="",
    marks={"write": "write", "call": "use"},
    crashes=False,
    evidence={"how": "unmarked"},
)
def function_without_mark_dirty(guard: Guard, repaired: int) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if repaired:
                ctx.mark_dirty(x)
            x.mul_(2)  # <- write
            return x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.fc(x)
            doubled = Double.apply(hidden)
            return (doubled + hidden).sum()  # <- use

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("inside-a-checkpoint", "AMP402", module="body", marks=BOTH, crashes=False, evidence={"how": "hooks"})
def inside_a_checkpoint(guard: Guard, repaired: int) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x).exp()  # <- save
            if repaired:
                x = x * 2
            else:
                x *= 2  # <- write
            return x.sin()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.body = Body()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.body, self.stem(x), use_reentrant=False).sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case(
    "hooks-that-return-an-alias",
    "AMP402",
    module="",
    marks=BOTH,
    crashes=False,
    also=("AMP409",),
    evidence={"how": "hooks"},
)
def hooks_that_return_an_alias(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.fc(x))  # <- save
            if repaired:
                x = x - 0.1
            else:
                x -= 0.1  # <- write
            return x.sum()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if repaired else tensor.detach()

    model = Net()
    with guard(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(rows()).backward()


@case("hooks-without-check", "AMP409", module="fc", marks={"save": "save"}, crashes=False)
def hooks_without_check(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sum()  # <- save

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if repaired else tensor.detach()

    model = Net()
    with guard(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(rows().requires_grad_()).backward()


@case("optimizer-writes-through-data", "AMP405", module="discriminator", marks=BOTH, crashes=False)
def optimizer_writes_through_data(guard: Guard, repaired: int) -> None:
    class Sgd(torch.optim.Optimizer):
        def __init__(self, parameters) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])

    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Linear(4, 4)
            self.discriminator = nn.Linear(4, 1)

    model = Gan()
    optimizer = Sgd(model.discriminator.parameters())
    with guard(model, optimizers=(optimizer,)):
        fake = model.generator(rows())
        loss_d = model.discriminator(fake.detach()).mean()
        loss_g = -model.discriminator(fake).mean()  # <- save
        loss_d.backward(retain_graph=True)
        if repaired:
            loss_g.backward()
        optimizer.step()  # <- write
        if not repaired:
            loss_g.backward()
