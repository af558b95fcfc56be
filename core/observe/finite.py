"""Look whether weights and statistics are finite, and how many optimizer steps a scaler skipped, where training stops
anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ampcheck.observe.probes.modes import alone
from ampcheck.observe.tensors import PLAIN
from ampcheck.observe.walk import plain_name
from ampcheck.source.printable import shown
from ampcheck.trace import Skips, StateNotFinite

_FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class State:
    """What trains, looked at several times. Buffers may be infinite on purpose, as masks are: apart from running
    statistics, one counts only if it was finite when it was looked at first."""

    def __init__(self, model: nn.Module, averaged: nn.Module | None) -> None:
        self._model, self._averaged = model, averaged
        self._first: frozenset[str] | None = None

    def look(self, moment: str) -> StateNotFinite | None:
        """What is not finite now; ``None`` if everything is."""
        with alone():
            parameters = list(_not_finite(_trained(self._model)))
            buffers = list(_not_finite(_buffers(self._model)))
            averaged = list(_not_finite(_kept(self._averaged))) if self._averaged is not None else []
        if self._first is None:
            self._first = frozenset(buffers)
        statistics = _statistics(self._model)
        broken = tuple(name for name in buffers if name in statistics or name not in self._first)
        if not (parameters or broken or averaged):
            return None
        return StateNotFinite(tuple(parameters), broken, tuple(averaged), moment)


class Scale:
    """What a scaler and the optimizers that it steps count, since it was looked at first."""

    def __init__(self, scaler: torch.amp.GradScaler, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._scaler, self._optimizers = scaler, list(optimizers)
        self._scale = _scale_of(scaler)
        self._counted = [_steps_of(one) for one in self._optimizers]

    def look(self, steps: int | None = None, skipped: int | None = None) -> Skips | None:
        """The skipped steps. ``steps`` is the number of steps that were asked for, ``skipped`` that of the skipped ones
        if somebody has counted them."""
        now = _scale_of(self._scaler)
        if skipped is not None and steps is not None:
            return Skips(skipped, steps, self._scale, now)
        counted = [_steps_of(one) for one in self._optimizers]
        if steps is not None and len(counted) == 1 and counted[0] is not None:
            missing = max(0, steps - (counted[0] - (self._counted[0] or 0)))
            # Somebody else may leave out steps: each that the scaler skips lowers its scale.
            return Skips(missing, steps, self._scale, now) if missing <= self._most(steps, now) else None
        if steps is None or now is None or self._scale is None or not 0 < now < self._scale:
            return None
        return Skips(min(round(self._lowered(now)), steps), steps, self._scale, now, exact=False)

    def _lowered(self, now: float, grown: float = 0) -> float:
        """How often the scale was lowered on its way to ``now``, if it was raised ``grown`` times."""
        backoff, growth = self._scaler.get_backoff_factor(), self._scaler.get_growth_factor()
        if self._scale is None or not (0 < backoff < 1 < growth):
            return 0
        return (math.log(now / self._scale) - grown * math.log(growth)) / math.log(backoff)

    def _most(self, steps: int, now: float | None) -> float:
        """The largest number of skipped steps that the scale agrees with."""
        if not now or not self._scale:
            return math.inf
        return round(self._lowered(now, steps // self._scaler.get_growth_interval()))


def _scale_of(scaler: torch.amp.GradScaler) -> float | None:
    # What it was made with need not be a number.
    scale: Any = scaler.get_scale() if scaler.is_enabled() else None
    return float(scale) if isinstance(scale, (int, float)) else None


def _steps_of(optimizer: torch.optim.Optimizer) -> int | None:
    """The steps that an optimizer has counted itself, as Adam does; ``None`` if it counts none."""
    counts = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    if not counts:
        return 0 if type(optimizer).__name__.startswith(("Adam", "NAdam", "RAdam")) and not optimizer.state else None
    return int(max(float(count) for count in counts))


def _not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
    """The names of the tensors that are not finite; one look at a device if all are."""
    looked = [(name, one.detach()) for name, one in named if _is_readable(one)]
    by_kind: dict[Any, list[tuple[str, torch.Tensor]]] = {}
    for name, one in looked:
        by_kind.setdefault((one.device, one.dtype), []).append((name, one))
    for group in by_kind.values():
        norms = torch.stack(torch._foreach_norm([one for _, one in group], math.inf))
        if bool(torch.isfinite(norms).all()):
            continue
        for (name, _), finite in zip(group, torch.isfinite(norms).tolist(), strict=True):
            if not finite:
                yield shown(plain_name(name))


def _is_readable(tensor: torch.Tensor) -> bool:
    return type(tensor) in PLAIN and tensor.dtype in _FLOATING and tensor.numel() > 0 and not tensor.is_meta


def _trained(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, one) for name, one in model.named_buffers())


def _kept(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    statistics = _statistics(model)
    yield from model.named_parameters()
    yield from ((name, one) for name, one in model.named_buffers() if shown(plain_name(name)) in statistics)


def _statistics(model: nn.Module) -> frozenset[str]:
    """The running statistics of normalization layers, by name."""
    kinds = (nn.modules.batchnorm._NormBase,)
    names = (
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key in ("running_mean", "running_var")
    )
    return frozenset(shown(plain_name(name)) for name in names)
