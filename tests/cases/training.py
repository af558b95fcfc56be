"""What the cases share: small inputs and a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BF16 = torch.bfloat16


def images(channels: int = 3) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * channels * 8 * 8).reshape(2, channels, 8, 8)


def rows(width: int = 4, count: int = 4) -> torch.Tensor:
    return torch.linspace(-1, 1, count * width).reshape(count, width)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    return torch.optim.SGD(list(parameters), lr=0.01)


def train(model: nn.Module, step: Callable[[], Any]) -> None:
    """One optimizer step, which must have a finite loss and change the model."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = sgd(model.parameters())
    loss = step().float().square().mean()
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss) or all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)):
        raise AssertionError("nothing was trained")
