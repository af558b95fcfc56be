"""What each module call looks like: autocast around it, dtypes in and out."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ampcheck.autograd import tensors_in
from ampcheck.probes.autocast import AutocastProbe, autocast_state
from ampcheck.probes.containment import contained
from ampcheck.trace import AutocastState, ModuleCall
from ampcheck.walk import dtype_name, is_sharded, module_names

# The fields of a `ModuleCall` that are known before it, in tuples of plain values: those cost the garbage collector
# nothing.
_Entered = tuple[str | None, str, tuple[str, bool, str, bool], int | None, bool, bool, bool, tuple[str, ...]]


class ModuleProbe:
    """Records the calls of all modules while it is active, through global module hooks.

    Nothing is stored on a module and no tensor is kept: dtypes are read at once, because an in-place operation that
    follows would change what a kept tensor shows. Calls that look alike are counted together.
    """

    def __init__(self, model: nn.Module, device_type: str, autocast: AutocastProbe) -> None:
        self.error: Exception | None = None
        self._names = module_names(model)
        self._sharded = is_sharded(model)
        self._device_type = device_type
        self._autocast = autocast
        self._counts: dict[tuple[_Entered, tuple[str, ...], tuple[str, ...]], int] = {}
        self._local = _Local()
        self._thread = threading.get_ident()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def calls(self) -> tuple[ModuleCall, ...]:
        """The calls in the order of their first return."""
        calls = []
        for (entered, outputs, own), count in self._counts.items():
            module, kind, state, region, grad_enabled, in_backward, leaf, inputs = entered
            autocast = AutocastState(*state)
            calls.append(
                ModuleCall(module, kind, autocast, region, grad_enabled, in_backward, inputs, outputs, count, leaf, own)
            )
        return tuple(calls)

    @property
    def current(self) -> str | None:
        """Qualified name of the innermost module of the model that the running thread is inside of."""
        for _, call in reversed(self._local.stack):
            if call[0] is not None:
                return call[0]
        return None

    def __enter__(self) -> ModuleProbe:
        self._handles = [register_module_forward_pre_hook(self.before)]
        self._handles.append(register_module_forward_hook(self.after, always_call=True))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._local = _Local()

    @contained
    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # What another thread runs is of interest only where it is the model, or data-parallel training's copy of it.
        if threading.get_ident() != self._thread and not (
            id(module) in self._names or getattr(module, "_is_replica", False)
        ):
            return
        with torch._C.DisableTorchFunction():
            state = autocast_state(self._device_type)
            call = (
                self._names.get(id(module)),
                type(module).__name__,
                (state.device_type, state.enabled, state.dtype, state.cache),
                self._autocast.current,
                torch.is_grad_enabled(),
                torch._C._current_graph_task_id() != -1,
                not module._modules,
                floating_dtypes(args),
            )
        self._local.stack.append((module, call))

    @contained
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A user's hook that raised before ours ran leaves no entry for this module.
        stack = self._local.stack
        while stack and stack[-1][0] is not module:
            if not any(entry[0] is module for entry in stack):
                return
            stack.pop()
        if not stack:
            return
        _, call = stack.pop()
        # Gradients do not pass through a data transform or a metric: those are none of the training forward.
        with torch._C.DisableTorchFunction():
            if call[0] is None and not call[2][1] and not _requires_grad((args, output)):
                return
            own: tuple[str, ...] = ()
            if self._sharded:
                # Whole, and in the dtype that forward computes in, they are there for the length of the call alone.
                own = floating_dtypes(p for p in module._parameters.values() if p is not None)
            seen = call, floating_dtypes((output,)), tuple(sorted(set(own)))
        self._counts[seen] = self._counts.get(seen, 0) + 1


class _Local(threading.local):
    """The calls that each thread is inside of, outermost first."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, _Entered]] = []


def floating_dtypes(values: Iterable[Any]) -> tuple[str, ...]:
    """Dtypes of the floating tensors in nested lists, tuples and dicts, in order."""
    return tuple(dtype_name(tensor.dtype) for tensor in tensors_in(list(values)) if tensor.is_floating_point())


def _requires_grad(values: Iterable[Any]) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(list(values)))
