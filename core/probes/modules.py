"""What each module call looks like: autocast around it, dtypes in and out."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ampcheck.probes.autocast import AutocastProbe, autocast_state
from ampcheck.probes.containment import contained
from ampcheck.trace import ModuleCall
from ampcheck.walk import dtype_name, module_names


class ModuleProbe:
    """Records the calls of all modules while it is active, through global module hooks.

    Nothing is stored on a module and no tensor is kept: dtypes are read at once, because an in-place operation that
    follows would change what a kept tensor shows. Calls that look alike are counted together.
    """

    def __init__(self, model: nn.Module, device_type: str, autocast: AutocastProbe) -> None:
        self.error: Exception | None = None
        self._names = module_names(model)
        self._device_type = device_type
        self._autocast = autocast
        self._counts: dict[ModuleCall, int] = {}
        self._local = _Local()
        self._thread = threading.get_ident()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def calls(self) -> tuple[ModuleCall, ...]:
        """The calls in the order of their first return."""
        return tuple(replace(call, count=count) for call, count in self._counts.items())

    @property
    def current(self) -> str | None:
        """Qualified name of the innermost module of the model that the running thread is inside of."""
        for _, call in reversed(self._local.stack):
            if call.module is not None:
                return call.module
        return None

    def __enter__(self) -> ModuleProbe:
        self._handles = [
            register_module_forward_pre_hook(self.before),
            register_module_forward_hook(self.after, always_call=True),
        ]
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
            call = ModuleCall(
                self._names.get(id(module)),
                type(module).__name__,
                autocast_state(self._device_type),
                self._autocast.current,
                torch.is_grad_enabled(),
                torch._C._current_graph_task_id() != -1,
                floating_dtypes(args),
                (),
                leaf=not module._modules,
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
            if call.module is None and not call.autocast.enabled and not _requires_grad((args, output)):
                return
            call = replace(call, outputs=floating_dtypes((output,)))
        self._counts[call] = self._counts.get(call, 0) + 1


class _Local(threading.local):
    """The calls that each thread is inside of, outermost first."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, ModuleCall]] = []


def floating_dtypes(values: Iterable[Any]) -> tuple[str, ...]:
    """Dtypes of the floating tensors in nested lists, tuples and dicts, in order."""
    return tuple(dtype_name(tensor.dtype) for tensor in _tensors(values) if tensor.is_floating_point())


def _requires_grad(values: Iterable[Any]) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(values))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    pending = list(values)
    while pending:
        value = pending.pop(0)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            pending[:0] = value.values()
        elif isinstance(value, (list, tuple)):
            pending[:0] = value
