"""Saved tensors that are overwritten before backward, and PyTorch says so (AMP401, AMP405, AMP407)."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases import Cases, Guard
from cases.inplace_helper import renormalize

CASES = Cases(family="in-place")
case = CASES.case
BOTH = {"write": "write", "save": "save"}


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@case(
    "dropout-after-activation",
    "AMP401",
    source=("https://github.com/huggingface/pytorch-image-models/issues/2355",),
    module="head",
    marks=BOTH,
    evidence={
        "node": "ReluBackward0",
        "slot": "result",
        "version_saved": 0,
        "version_found": 1,
        "dtype": "float32",
        "shape": [3, 8],
    },
)
def dropout_after_activation(guard: Guard, repaired: int) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.norm(x))  # <- save
            if repaired:
                x = F.dropout(x, 0.2, training=self.training)
            else:
                x = F.dropout(x, 0.2, inplace=True, training=self.training)  # <- write
            return self.fc(x)

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 8))
    model.add_module("head", Head())
    with guard(model):
        model(rows()).sum().backward()


@case(
    "residual-after-in-place-activation",
    "AMP401",
    source=("https://github.com/pytorch/pytorch/issues/5687",),
    module="block",
    marks=BOTH,
)
def residual_after_in_place_activation(guard: Guard, repaired: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.body(x)  # <- save
            if repaired:
                out = out + x
            else:
                out += x  # <- write
            return out

    model = nn.Sequential()
    model.add_module("block", Block())
    with guard(model):
        model(images()).square().sum().backward()


@case(
    "neck-adds-in-place",
    "AMP401",
    source=(
        "https://github.com/open-mmlab/mmdetection/pull/9450",
        "https://github.com/open-mmlab/mmsegmentation/pull/1103",
    ),
    module="neck",
    marks=BOTH,
)
def neck_adds_in_place(guard: Guard, repaired: int) -> None:
    class Neck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lateral_convs = nn.ModuleList(
                nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)) for _ in range(3)
            )

        def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
            laterals = [conv(level) for conv, level in zip(self.lateral_convs, levels, strict=True)]  # <- save
            for i in range(len(levels) - 1, 0, -1):
                shape = laterals[i - 1].shape[2:]
                if repaired:
                    laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=shape)
                else:
                    laterals[i - 1] += F.interpolate(laterals[i], size=shape)  # <- write
            return laterals

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = Neck()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            levels = [F.avg_pool2d(x, 2**i) for i in range(3)]
            return sum(level.square().sum() for level in self.neck(levels))

    model = Detector()
    with guard(model):
        model(images()).backward()


@case(
    "two-in-place-activations",
    "AMP401",
    source=("https://github.com/pytorch/pytorch/issues/34429",),
    module="",
    marks=BOTH,
)
def two_in_place_activations(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.fc(x), inplace=True)  # <- save
            if repaired:
                return F.relu(x)
            return F.relu(x, inplace=True)  # <- write

    model = Net()
    with guard(model):
        model(rows()).sum().backward()


@case(
    "activation-overwrites-skip-path",
    "AMP401",
    source=(
        "https://github.com/osmr/imgclsmob/issues/13",
        "https://github.com/aupendu/zero-restore/issues/7",
    ),
    module="blocks.0.act",
    marks=BOTH,
)
def activation_overwrites_skip_path(guard: Guard, repaired: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip = nn.Conv2d(3, 3, 1)
            self.act = nn.ReLU(inplace=not repaired)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skip = self.skip(x)  # <- save
            return skip + self.conv(self.act(x))  # <- write

    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 1))
    model.add_module("blocks", nn.Sequential(Block()))
    with guard(model):
        model(images()).sum().backward()


@case(
    "write-by-index",
    "AMP401",
    source=("https://github.com/pytorch/pytorch/issues/9391",),
    module="",
    marks=BOTH,
    evidence={"node": "SigmoidBackward0", "slot": "result"},
)
def write_by_index(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.fc(x).sigmoid()  # <- save
            if repaired:
                gate = gate.clone()
            gate[1] = 2  # <- write
            return gate.sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case(
    "layer-writes-to-its-input",
    "AMP401",
    source=("https://github.com/aupendu/zero-restore/issues/7",),
    module="skip",
    marks=BOTH,
)
def layer_writes_to_its_input(guard: Guard, repaired: int) -> None:
    class Skip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                return x.mul(0.5)
            return x.mul_(0.5)  # <- write

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Linear(4, 4)
            self.skip = Skip()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.conv(x))  # <- save
            return (self.skip(x) + x).sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case(
    "backward-multiplies-what-it-saved",
    "AMP401",
    source=("https://github.com/k2-fsa/k2/pull/1106",),
    module=None,
    marks=BOTH,
)
def backward_multiplies_what_it_saved(guard: Guard, repaired: int) -> None:
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(2 * x)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad_output):
            (grad,) = ctx.saved_tensors
            if repaired:
                return grad.mul(grad_output)
            return grad.mul_(grad_output)  # <- write

    model = nn.Linear(4, 4)
    with guard(model):
        loss = Loss.apply(model(rows()))  # <- save
        loss.backward(retain_graph=True)
        loss.backward()


@case("third-iteration", "AMP401", module="", marks=BOTH)
def third_iteration(guard: Guard, repaired: int) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = torch.zeros_like(x)
            for step in range(4):
                state = torch.tanh(self.cell(x) + state)  # <- save
                if step == 2 and not repaired:
                    state *= 0.5  # <- write
            return state.sum()

    model = Recurrent()
    with guard(model):
        model(rows()).backward()


@case("helper-in-another-file", "AMP401", module="", marks={"save": "save"})
def helper_in_another_file(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = self.fc(x).exp()  # <- save
            return renormalize(weights.clone() if repaired else weights).square().sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("out-argument", "AMP401", module="", marks=BOTH)
def out_argument(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = (x > 0).float()
            y = self.scale * mask  # <- save
            if repaired:
                torch.add(mask, 1)
            else:
                torch.add(mask, 1, out=mask)  # <- write
            return y.sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("many-at-once", "AMP401", module="", marks=BOTH)
def many_at_once(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states = [self.fc(x).sigmoid() for _ in range(3)]  # <- save
            if repaired:
                states = list(torch._foreach_mul(states, 0.9))
            else:
                torch._foreach_mul_(states, 0.9)  # <- write
            return torch.stack(states).sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("write-through-a-view", "AMP401", module="", marks=BOTH)
def write_through_a_view(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            probabilities = self.fc(x).softmax(-1)  # <- save
            if repaired:
                probabilities = probabilities.clone()
            probabilities[:, 1:3].clamp_(min=0.1)  # <- write
            return probabilities.log().sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("saved-by-a-write-to-a-view", "AMP401", module="", marks=BOTH)
def saved_by_a_write_to_a_view(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.fc(x)
            canvas = torch.ones(3, 4) * self.fc(x)
            canvas[:, 0].mul_(weight[:, 0])  # <- save
            if repaired:
                weight = weight + 1
            else:
                weight += 1  # <- write
            return canvas.sum() + weight.sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("inside-a-reentrant-checkpoint", "AMP401", module="body", marks=BOTH)
def inside_a_reentrant_checkpoint(guard: Guard, repaired: int) -> None:
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
            return checkpoint(self.body, self.stem(x), use_reentrant=True).sum()

    model = Net()
    with guard(model):
        model(rows()).backward()


@case("under-autocast", "AMP401", module="", marks=BOTH, evidence={"dtype": "bfloat16"})
def under_autocast(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.fc(x))  # <- save
            if repaired:
                return x.clamp(max=1)
            return x.clamp_(max=1)  # <- write

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(rows()).float().sum().backward()


@case("backward-in-another-thread", "AMP401", module="", marks=BOTH)
def backward_in_another_thread(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.fc(x))  # <- save
            if repaired:
                return x.sub(1).sum()
            return x.sub_(1).sum()  # <- write

    raised: list[Exception] = []

    def run(loss: torch.Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            raised.append(error)

    model = Net()
    with guard(model):
        thread = threading.Thread(target=run, args=(model(rows()),))
        thread.start()
        thread.join()
        if raised:
            raise raised[0]


@case("accumulated-over-two-batches", "AMP401", module="", marks=BOTH)
def accumulated_over_two_batches(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (self.fc(x) * mask).sum()  # <- save

    model = Net()
    with guard(model):
        mask = torch.ones(3, 4)
        losses = []
        for _ in range(2):
            losses.append(model(rows(), mask.clone() if repaired else mask))
            mask.bernoulli_(0.5)  # <- write
        sum(losses).backward()


@case(
    "generator-after-discriminator-step",
    "AMP405",
    source=(
        "https://github.com/pytorch/pytorch/issues/39141",
        "https://github.com/MorvanZhou/PyTorch-Tutorial/pull/91",
        "https://github.com/chojw/genb/issues/6",
        "https://github.com/lcy0604/EraseNet/issues/5",
    ),
    module="discriminator",
    marks=BOTH,
)
def generator_after_discriminator_step(guard: Guard, repaired: int) -> None:
    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = nn.Linear(4, 4)
            self.discriminator = nn.Linear(4, 1)

    model = Gan()
    optimizer_g = torch.optim.Adam(model.generator.parameters())
    optimizer_d = torch.optim.Adam(model.discriminator.parameters())
    with guard(model, optimizers=(optimizer_g, optimizer_d)):
        fake = model.generator(rows())
        loss_d = model.discriminator(fake.detach()).mean()
        loss_g = -model.discriminator(fake).mean()  # <- save
        loss_d.backward(retain_graph=True)
        if repaired == 1:
            loss_g.backward()
        optimizer_d.step()  # <- write
        if repaired == 2:
            loss_g = -model.discriminator(fake).mean()
        if repaired != 1:
            loss_g.backward()
        optimizer_g.step()


@case(
    "buffer-rewritten-in-second-forward",
    "AMP407",
    source=("https://github.com/huggingface/transformers/issues/22994",),
    module="norm",
    marks=BOTH,
    evidence={"tensor": "norm.scale"},
)
def buffer_rewritten_in_second_forward(guard: Guard, repaired: int) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.scale.lerp_(x.detach().abs().mean(0), 0.1)  # <- write
            return x * (self.scale.clone() if repaired else self.scale)  # <- save

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.norm = Norm()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.fc(x)).sum()

    model = Net()
    with guard(model):
        (model(rows()) - model(rows() + 1)).backward()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", f"file://{directory}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def broadcasts_count() -> bool:
    """Whether DDP's broadcast of buffers counts as a write in a single process: it did in PyTorch 2.4."""
    layer = nn.Linear(1, 1)
    layer.register_buffer("scale", torch.ones(1))
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(layer)
        version = layer.scale._version
        wrapped(torch.ones(1, 1))
        return layer.scale._version > version


@case(
    "buffers-broadcast-between-forwards",
    "AMP407",
    source=(
        "https://github.com/pytorch/pytorch/issues/22095",
        "https://github.com/NVlabs/FUNIT/issues/53",
        "https://github.com/huggingface/transformers/issues/24996",
        "https://github.com/huggingface/transformers/issues/11941",
    ),
    module="",
    marks={"save": "save"},
    evidence={"tensor": "scale"},
    fails=broadcasts_count,
)
def buffers_broadcast_between_forwards(guard: Guard, repaired: int) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.scale  # <- save

    model = Encoder()
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=not repaired)
        with guard(model):
            (wrapped(rows()).mean() - wrapped(rows() + 1).square().mean()).backward()
