"""Plain training loops on the digits, and the pieces to break them with."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers
from digits import digits
from torch import Tensor, nn
from torch.nn import functional as F

from ampcheck import Report

# Whether a CPU computes bfloat16 natively is a fact of the machine, not of the loop.
MACHINE = "AMP107"


class CNN(nn.Module):
    """8 modules: convolution, batch norm, in-place activation, dropout and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AvgPool2d(2)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.conv(images))))
        return self.head(self.drop(x.flatten(1)))


class Block(nn.Module):
    """A transformer over the rows of a digit. Its fast path for evaluation fails under CPU autocast in PyTorch 2.4."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images.squeeze(1))).mean(1))


@dataclass
class Trained:
    """What a loop leaves: every tensor and state that must not depend on AmpCheck."""

    losses: list[Tensor] = field(default_factory=list)
    evaluated: list[Tensor] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


def batches(steps: int, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = digits("train", steps * size)
    yield from zip(images.split(size), labels.split(size), strict=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 3,
    dtype: torch.dtype | None = torch.bfloat16,
    scaler: torch.amp.GradScaler | None = None,
    device_type: str = "cpu",
    after_step: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    """A loop as tutorials write it; ``dtype=None`` trains without autocast. Returns the losses."""
    losses = []
    for step, (images, labels) in enumerate(batches(steps)):
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device_type, dtype=dtype) if dtype else contextlib.nullcontext():
            loss = F.cross_entropy(model(images), labels)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.detach())
        after_step(step)
    return losses


def evaluate(model: nn.Module, dtype: torch.dtype | None = torch.bfloat16, *, inference: bool = False) -> list[Tensor]:
    """Two batches of the other digits without gradients."""
    images, _ = digits("val", 32)
    model.eval()
    without_gradients = torch.inference_mode() if inference else torch.no_grad()
    with without_gradients, torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
        return [model(batch).clone() for batch in images.split(16)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def found(report: Report | None) -> dict[str, str]:
    """Severity by code."""
    assert report is not None
    return {finding.code: str(finding.severity) for finding in report.findings}


def random_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state(), random.getstate(), name, keys.tobytes(), *rest


def same(first: Any, second: Any) -> bool:
    """Equal to the bit, through nested containers; NaN equals NaN of the same bits."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and first.detach()
            .reshape(-1)
            .contiguous()
            .view(torch.uint8)
            .equal(second.detach().reshape(-1).contiguous().view(torch.uint8))
        )
    if isinstance(first, dict):
        return isinstance(second, dict) and [*first] == [*second] and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# What Python's copying and PyTorch's compiler leave with a class.
ALTERED = ("__slotnames__", "__annotations__", "__init__", "__setstate__", "__setattr__")


def traces_left() -> dict[str, Any]:
    """All that a probe or a hook could leave behind in the process."""
    left: dict[str, Any] = {
        f"{owner.__name__}.{name}": dict(value)
        for owner in (modules, optimizers)
        for name, value in vars(owner).items()
        if name.startswith("_global") and isinstance(value, dict)
    }
    left["function modes"] = torch._C._len_torch_function_stack()
    left["dispatch modes"] = torch._C._len_torch_dispatch_stack()
    left["autocast"] = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    left["autocast dtype"] = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")]
    left["autocast cache"] = torch.is_autocast_cache_enabled()
    left["grad"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    left["saved-tensor hooks"] = top_hooks(True) if top_hooks else None
    for owner in (torch.autocast, nn.Module, torch.Tensor, torch.optim.Optimizer, torch.amp.GradScaler):
        left[owner.__name__] = {k: v for k, v in vars(owner).items() if k not in ALTERED and k[:3] != "___"}
    left["torch.autograd"] = dict(vars(torch.autograd))
    listened = (torch.autograd, torch.autograd.graph, torch.nn.utils, torch.autocast, nn.Module, torch.Tensor)
    for owner in (*listened, torch.optim.Optimizer, torch.amp.GradScaler, torch.autograd.graph.saved_tensors_hooks):
        functions = {k: getattr(inspect.unwrap(v), "__code__", None) for k, v in vars(owner).items() if callable(v)}
        functions = {k: v for k, v in functions.items() if k not in ALTERED and k[:3] != "___"}
        left[f"codes of {owner.__name__}"] = functions
    left["sys"] = sys.excepthook, sys.getprofile(), sys.gettrace(), threading.excepthook
    return left


def exports_left() -> dict[str, Any]:
    """The code of PyTorch's export functions, which is exchanged until a run ends."""
    owners = (torch.jit, torch.jit._script.RecursiveScriptModule, torch.export, torch.onnx)
    return {f"codes of {o.__name__}": {k: getattr(v, "__code__", None) for k, v in vars(o).items()} for o in owners}
