"""The kin of the in-place error: leaves, views, inference tensors, graphs that are gone, backward hooks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from cases import Cases, Guard

CASES = Cases(family="autograd")
case = CASES.case
WRITE = {"write": "write"}


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@case("update-by-hand", "AMP403", source=("https://github.com/pytorch/examples/pull/779",), module=None, marks=WRITE)
def update_by_hand(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    with guard(model):
        model(rows()).sum().backward()
        with torch.set_grad_enabled(not repaired):
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad  # <- write


@case(
    "input-that-requires-grad",
    "AMP403",
    source=("https://github.com/pytorch/pytorch/issues/727",),
    module="",
    marks=WRITE,
)
def input_that_requires_grad(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(x) if repaired else F.relu(x, inplace=True)  # <- write
            return self.fc(x)

    model = Net()
    with guard(model):
        model(rows().clone().requires_grad_()).sum().backward()


@case(
    "half-of-a-chunk",
    "AMP404",
    source=(
        "https://github.com/pytorch/pytorch/pull/58285",
        "https://github.com/TeenLucifer/grpo_reproduce/issues/11",
    ),
    module="gate",
    marks={"write": "write", "call": "view"},
)
def half_of_a_chunk(guard: Guard, repaired: int) -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value, gate = x.chunk(2, dim=1)  # <- view
            if repaired:
                value = value * gate.sigmoid()
            else:
                value *= gate.sigmoid()  # <- write
            return value

    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("gate", Gate())
    with guard(model):
        model(rows()).sum().backward()


@case(
    "column-of-a-weight",
    "AMP404",
    source=(
        "https://github.com/Hunter-DDM/knowledge-neurons/issues/14",
        "https://github.com/PingoLH/FCHarDNet/issues/61",
    ),
    module=None,
    marks=WRITE,
)
def column_of_a_weight(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    with guard(model), torch.set_grad_enabled(not repaired):
        model.weight[:, 0] -= 1  # <- write


@case(
    "view-made-without-grad", "AMP404", source=("https://github.com/ccarliu/m3ae/issues/15",), module=None, marks=WRITE
)
def view_made_without_grad(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 4)
    with guard(model):
        base = model(rows())
        with torch.set_grad_enabled(bool(repaired)):
            view = base[:2]
        view.mul_(2)  # <- write
        base.sum().backward()


@case("write-to-an-expanded-view", "AMP404", module="", marks=WRITE)
def write_to_an_expanded_view(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.ones(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = self.mask.expand(len(x), -1)
            if repaired:
                mask = mask.clone()
            mask[:, 0] *= 2  # <- write
            return self.fc(x) * mask

    model = Net()
    with guard(model):
        model(rows()).sum().backward()


@case(
    "frozen-backbone-in-inference-mode",
    "AMP406",
    source=(
        "https://github.com/open-mmlab/mmsegmentation/issues/3499",
        "https://github.com/facebookresearch/dinov2/issues/472",
    ),
    module="head",
    marks={"raise": "raise", "call": "made"},
)
def frozen_backbone_in_inference_mode(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad() if repaired else torch.inference_mode():
                features = self.backbone(x)  # <- made
            return self.head(features)  # <- raise

    model = Net()
    with guard(model):
        model(rows()).sum().backward()


@case("backward-twice", "AMP408", module=None, marks={"raise": "raise", "call": "first"})
def backward_twice(guard: Guard, repaired: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    with guard(model):
        shared = model(rows())
        first, second = shared.sum(), shared.square().sum()
        if repaired:
            (first + second).backward()
        else:
            first.backward()  # <- first
            second.backward()  # <- raise


@case("loss-of-a-detached-output", "AMP408", module=None, marks={"raise": "raise", "call": "cut"})
def loss_of_a_detached_output(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    with guard(model):
        output = model(rows())
        if not repaired:
            output = output.detach()  # <- cut
        loss = F.mse_loss(output, torch.zeros(3, 2))
        loss.backward()  # <- raise


@case("loss-under-no-grad", "AMP408", module=None, marks={"raise": "raise", "call": "cut"})
def loss_under_no_grad(guard: Guard, repaired: int) -> None:
    model = nn.Linear(4, 2)
    with guard(model):
        with torch.set_grad_enabled(bool(repaired)):
            output = model(rows())  # <- cut
        output.square().sum().backward()  # <- raise


@case("backward-hook-before-in-place-activation", "AMP410", module="1", marks=WRITE, evidence={"hooked": ["0"]})
def backward_hook_before_in_place_activation(guard: Guard, repaired: int) -> None:
    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x) if repaired else F.relu_(x)  # <- write

    model = nn.Sequential(nn.Linear(4, 4), Act())
    model[0].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with guard(model):
        model(rows()).sum().backward()
