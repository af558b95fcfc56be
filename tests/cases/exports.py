"""Exports that compute something else than the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cases import Cases, Guard
from cases.training import BF16, rows

CASES = Cases(family="export", crashes=False, trains=False, marks={}, module="body.1")
case = CASES.case


class Net(nn.Module):
    """``body.0`` and ``body.2`` around the module under test, ``body.1``."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.body(x)))


def traced(model: nn.Module) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, rows())


@case(
    "branch-on-data",
    "AMP601",
    marks={"call": "decides"},
    evidence={"reason": "data-dependent"},
    reason="data-dependent",
)
def branch_on_data(guard: Guard, repaired: int) -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                return torch.where(x.mean() > 0, x, -2 * x)
            if x.mean() > 0:  # <- decides
                return x
            return -2 * x

    model = Net(Gate()).eval()
    with guard.export() as compare:
        compare(model, traced(model), rows())


@case("dropout-left-in-training-mode", "AMP601", reason="training-mode")
def dropout_left_in_training_mode(guard: Guard, repaired: int) -> None:
    model = Net(nn.Dropout(0.5))
    with guard.export() as compare:
        if repaired:
            model.eval()
        with torch.no_grad():
            exported = torch.jit.trace(model, rows(), check_trace=False)
        compare(model.eval(), exported, rows())


@case(
    "attention-outside-of-the-dispatcher",
    "AMP602",
    source=(
        "https://github.com/open-mmlab/mmdetection/issues/11371",
        "https://github.com/open-mmlab/mmdetection/issues/11365",
    ),
    marks={"call": "leaves"},
    also=("AMP601",),
)
def attention_outside_of_the_dispatcher(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                return x.tanh() * 2
            y = torch.from_numpy(np.tanh(x.detach().numpy()))  # <- leaves
            return y * 2

    model = Net(Attention()).eval()
    with guard.export() as compare:
        compare(model, traced(model), rows())


@case("function-that-the-graph-cannot-see-into", "AMP603")
def function_that_the_graph_cannot_see_into(guard: Guard, repaired: int) -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.round() if repaired else Round.apply(x)

    model = Net(Rounding()).eval()
    with guard.export() as compare:
        compare(model, traced(model), rows())


@case(
    "trace-under-autocast",
    "AMP604",
    source=("https://github.com/pytorch/pytorch/issues/50231", "https://github.com/pytorch/pytorch/issues/84092"),
    module=None,
    evidence={"dtype": "bfloat16"},
)
def trace_under_autocast(guard: Guard, repaired: int) -> None:
    model = Net(nn.Tanh()).eval()
    with guard.export() as compare:
        with torch.autocast("cpu", dtype=BF16, enabled=not repaired, cache_enabled=False):
            exported = traced(model)
        compare(model, exported, rows())
