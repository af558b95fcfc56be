"""Run a step in another precision than the one it asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ampcheck.precision import LOW_PRECISION

_LOW = frozenset(getattr(torch, name) for name in LOW_PRECISION)
_CASTS = {torch.Tensor.half, torch.Tensor.bfloat16}


@contextlib.contextmanager
def computed_in(dtype: torch.dtype, model: nn.Module, device_type: str) -> Iterator[None]:
    """Compute in ``dtype`` what asks for float16 or bfloat16: in autocast regions, also in those whose object was made
    earlier, with the parameters and buffers of ``model``, and in casts.

    With float32, autocast is off. Parameters keep their identity, and get other memory: the caller puts it back.
    """
    enter: Any = torch.autocast.__enter__
    full = dtype is torch.float32

    def instead(region: Any) -> Any:
        kept = region._enabled, region.fast_dtype
        if full:
            region._enabled = False
        elif region.fast_dtype in _LOW:
            region.fast_dtype = dtype
        try:
            return enter(region)
        finally:
            region._enabled, region.fast_dtype = kept

    with torch.no_grad():
        low = [one for one in (*model.parameters(), *model.buffers()) if one.dtype in _LOW and one.dtype is not dtype]
        for tensor in low:
            tensor.data = tensor.data.to(dtype)
    around = torch.is_autocast_enabled(device_type)
    with contextlib.ExitStack() as stack:
        if around:
            stack.enter_context(torch.autocast(device_type, dtype=None if full else dtype, enabled=not full))
        torch.autocast.__enter__ = instead  # type: ignore[method-assign]
        stack.callback(setattr, torch.autocast, "__enter__", enter)
        stack.enter_context(_Casts(dtype))
        yield


class _Casts(TorchFunctionMode):
    """Has casts to float16 and bfloat16 give ``dtype``, and operands that are in one of them too."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].to(self._dtype)
        if func not in _READS:
            args, kwargs = tree_map(self._instead, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _instead(self, value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return self._dtype if value in _LOW else value
        if isinstance(value, torch.Tensor) and value.dtype in _LOW and value.dtype is not self._dtype:
            return value.to(self._dtype)
        return value


def _getters(names: Iterable[str]) -> Iterator[Any]:
    for name in names:
        yield getattr(torch.Tensor, name).__get__


_READS = frozenset(_getters(("dtype", "grad", "data", "grad_fn", "requires_grad", "is_leaf", "shape", "device")))


class Changed:
    """A step that runs with gradients of its own, with a loss scale of ``scale``, and within ``within()``. ``roots``
    are those of the step."""

    def __init__(
        self,
        step: Callable[[], Any],
        tensors: Iterable[torch.Tensor],
        scaler: torch.amp.GradScaler | None,
        within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._step, self._scaler, self._within = step, scaler, within
        self._tensors = list(tensors)
        self.roots: tuple[Any, ...] = (step, *getattr(step, "roots", ()))

    def __call__(self) -> Any:
        # The failing step may have left gradients that are not finite.
        for tensor in self._tensors:
            tensor.grad = None
        scale = getattr(self._scaler, "_scale", None)
        if scale is not None:
            scale.fill_(1.0)
            # It may have been stopped between its step and its update.
            getattr(self._scaler, "_per_optimizer_states", {}).clear()
        with self._within():
            return self._step()
