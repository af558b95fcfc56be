"""What a plain loop reveals about itself: its optimizers, its scaler, the precision it trains in."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ampcheck.observe.probes.autocast import autocast_state
from ampcheck.observe.walk import dtype_name, examine_optimizer
from ampcheck.precision import Precision
from ampcheck.trace import AutocastRegion


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def is_part(module: nn.Module, whole: nn.Module) -> bool:
    return any(part is module for part in nn.Module.modules(whole))


def holder_of(module: nn.Module) -> nn.Module:
    """The smallest module alive that ``module`` is a part of and that has all parameters which an optimizer trains
    together with ``module``'s; by default ``module`` itself."""
    own = {id(parameter) for parameter in module.parameters()}
    trained = own.union(*(held_by(optimizer) for optimizer in optimizers_of(module)))
    if trained == own:
        return module
    holders: list[tuple[int, nn.Module]] = []
    for one in _alive(nn.Module):
        # One that is not built yet has no parts.
        with contextlib.suppress(Exception):
            held = {id(parameter) for parameter in nn.Module.parameters(one)}
            if trained <= held and is_part(module, one):
                holders.append((len(held), one))
    return min(holders, key=lambda pair: pair[0])[1] if holders else module


def is_like(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    """Whether an optimizer holds none of ``module``'s parameters, but as many of the same shapes."""
    info = examine_optimizer(optimizer, module)
    return info.alike and not info.of_model and info.parameters > 0


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """Whether none of an optimizer's parameters has a gradient: a step of it changes nothing."""
    return all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"])


def optimizers_of(module: nn.Module) -> list[torch.optim.Optimizer]:
    """The live optimizers that hold parameters of ``module``."""
    own = {id(parameter) for parameter in module.parameters()}
    return [optimizer for optimizer in _alive(torch.optim.Optimizer) if own & held_by(optimizer)]


def scaler_of(module: nn.Module) -> torch.amp.GradScaler | None:
    """A live scaler, preferably an enabled one, if ``module`` is about to run in float16.

    Float16 is seldom meant to run without one. In other dtypes a live scaler may belong to another run.
    """
    if not _float16_in_force(module):
        return None
    scalers = _alive(torch.amp.GradScaler)
    return next((one for one in scalers if one.is_enabled()), scalers[0] if scalers else None)


def precision_of(module: nn.Module, scaler: torch.amp.GradScaler | None, around: Iterable[AutocastRegion]) -> Precision:
    """The precision that the loop shows at its first training forward, inside the regions ``around``."""
    tensor = next(module.parameters(), None)
    if tensor is None or not torch.amp.is_autocast_available(tensor.device.type):
        return Precision()
    device_type, scaling = tensor.device.type, scaler.is_enabled() if scaler is not None else None
    state = autocast_state(device_type)
    entered = [region for region in around if region.requested]
    if state.enabled or entered:
        region = next((r for r in entered if r.enabled == state.enabled), None)
        where = f"the autocast region at {region.site}" if region and region.site else "an autocast region"
        dtype = state.dtype if state.enabled or region is None else region.dtype
        scaling = False if scaling is None and dtype == "float16" else scaling
        return Precision("mixed", device_type, dtype, scaling, where)
    precision = Precision("true", device_type, dtype_name(tensor.dtype), False, explicit=False)
    return precision if scaler is None else precision_with(scaler, precision)


def precision_with(scaler: torch.amp.GradScaler, precision: Precision) -> Precision:
    """``precision`` of a loop that uses ``scaler``, which by itself asks for mixed precision."""
    if not scaler.is_enabled() or precision.mixed:
        return replace(precision, scaler=scaler.is_enabled())
    return Precision("mixed", precision.device_type, None, True, f"an enabled {type(scaler).__name__}")


def _float16_in_force(module: nn.Module) -> bool:
    device_type = next((parameter.device.type for parameter in module.parameters()), "cpu")
    if not torch.amp.is_autocast_available(device_type):
        return False
    state = autocast_state(device_type)
    return state.enabled and state.dtype == "float16"


def _alive(kind: type[Any]) -> list[Any]:
    """The live objects of a class. ``isinstance`` would run the code of proxies; their type does not lie."""
    return [item for item in gc.get_objects() if issubclass(type(item), kind)]
