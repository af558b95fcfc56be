"""What the frames of a gradient scaler know: the optimizer it was working on, and the state of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ampcheck.failure.frames import Place
from ampcheck.walk import dtype_name, tensor_names

_LISTED = 20


def optimizer_of(found: Sequence[Place]) -> torch.optim.Optimizer | None:
    """The optimizer the innermost scaler frame was handed."""
    for place in reversed(found):
        if place.in_torch("amp/grad_scaler.py"):
            optimizer = place.names.get("optimizer")
            # Hosts hand in wrappers of their own, which keep the groups of the optimizer inside.
            if hasattr(optimizer, "param_groups"):
                return optimizer
    return None


def low_precision_gradients(found: Sequence[Place], root: nn.Module | None) -> dict[str, Any]:
    """Every parameter of the optimizer whose gradient is float16: how many, and which."""
    optimizer = optimizer_of(found)
    if optimizer is None:
        return {}
    named = _named(optimizer, root)
    low = [(name, p) for name, p in named if p.grad is not None and p.grad.dtype is torch.float16]
    return {
        "optimizer": type(optimizer).__name__,
        "optimized": len(named),
        "count": len(low),
        "parameters": [
            {"name": name, "dtype": dtype_name(p.dtype), "shape": list(p.shape)} for name, p in low[:_LISTED]
        ],
        "names": [name for name, _ in low],
    }


def missing_gradients(found: Sequence[Place], root: nn.Module | None) -> dict[str, Any]:
    """The optimizer's parameters by why they have no gradient, and how many of the model's have one."""
    optimizer = optimizer_of(found)
    if optimizer is None:
        return {}
    named = _named(optimizer, root)
    held = {id(p) for _, p in named}
    own = {id(p) for p in root.parameters()} if root is not None else set()
    groups: dict[str, list[str]] = {"frozen": [], "not-the-models": [], "no-gradient": []}
    for name, parameter in named:
        if parameter.grad is not None:
            continue
        if not parameter.requires_grad:
            groups["frozen"].append(name)
        elif own and id(parameter) not in own:
            groups["not-the-models"].append(name)
        else:
            groups["no-gradient"].append(name)
    others = [
        name
        for name, p in (root.named_parameters() if root is not None else ())
        if p.grad is not None and id(p) not in held
    ]
    return {
        "optimizer": type(optimizer).__name__,
        "optimized": len(named),
        "without_gradient": {why: names for why, names in groups.items() if names},
        "gradients_elsewhere": others,
    }


def scaler_argument(found: Sequence[Place]) -> dict[str, Any]:
    """The argument that a scaler was made with and should not have been: ``init_scale`` where a device was meant."""
    for place in reversed(found):
        scaler = place.receiver
        if place.in_torch("amp/grad_scaler.py") and isinstance(scaler, torch.amp.GradScaler):
            kind = type(scaler)
            old = kind is not torch.amp.GradScaler and kind.__module__.startswith(("torch.cuda", "torch.cpu"))
            name = f"torch.{kind.__module__.split('.')[1]}.amp.GradScaler" if old else "torch.amp.GradScaler"
            return {"scaler": name, "argument": "init_scale", "value": repr(scaler._init_scale)}
    return {}


def stage(found: Sequence[Place]) -> dict[str, Any]:
    """Which optimizer the scaler was asked to work on."""
    optimizer = optimizer_of(found)
    return {"optimizer": type(optimizer).__name__} if optimizer is not None else {}


def _named(optimizer: Any, root: nn.Module | None) -> list[tuple[str, torch.Tensor]]:
    names = tensor_names(root) if root is not None else {}
    return [
        (names.get(id(parameter), f"param_groups[{g}]['params'][{i}]"), parameter)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    ]
