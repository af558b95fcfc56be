"""What can be seen of a compiled model without making it compile again: the way in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ampcheck.probes.autocast import AutocastProbe, autocast_state
from ampcheck.probes.containment import contained, hide_frame
from ampcheck.probes.modules import floating_dtypes
from ampcheck.trace import ModuleCall
from ampcheck.walk import compiled_modules, module_names, unwrapped


class CompiledProbe:
    """Records how the compiled modules of a model are called, each from the outside.

    Dynamo guards on global module hooks and on function modes: with those, the model would compile twice.
    """

    def __init__(self, model: nn.Module, device_type: str, autocast: AutocastProbe) -> None:
        self.error: Exception | None = None
        compiled = compiled_modules(model)
        inside = {id(part) for module in compiled for part in module.modules() if part is not module}
        self._modules = [module for module in compiled if id(module) not in inside]
        self._names = module_names(unwrapped(model))
        self._device_type = device_type
        self._autocast = autocast
        self._counts: dict[ModuleCall, int] = {}
        self._calls_seen = ExitStack()

    @property
    def calls(self) -> tuple[ModuleCall, ...]:
        return tuple(replace(call, count=count) for call, count in self._counts.items())

    @property
    def current(self) -> None:
        return None

    def __enter__(self) -> CompiledProbe:
        for module in self._modules:
            self._calls_seen.callback(on_call(module, self.called))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._calls_seen.close()

    @contained
    def called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        call = ModuleCall(
            self._names.get(id(unwrapped(module))),
            type(unwrapped(module)).__name__,
            autocast_state(self._device_type),
            self._autocast.current,
            torch.is_grad_enabled(),
            torch._C._current_graph_task_id() != -1,
            floating_dtypes(args),
            (),
            leaf=False,
        )
        self._counts[call] = self._counts.get(call, 0) + 1


def on_call(
    module: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...]], None],
    after: Callable[[nn.Module, tuple[Any, ...], Any], None] | None = None,
) -> Callable[[], None]:
    """Have ``before(module, args)`` called ahead of every call of ``module``, and ``after(module, args, output)``
    behind it, outside of what is compiled. Returns the function that ends it."""
    original = module._compiled_call_impl
    if original is None:
        handles = [module.register_forward_pre_hook(_Hook(before))]
        if after is not None:
            handles.append(module.register_forward_hook(_Hook(after)))

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    # `module.compile()` compiles the hooks of the module too.
    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args)
        try:
            output = original(*args, **kwargs)
        except BaseException as error:
            hide_frame(error)
            raise
        if after is not None:
            after(module, args, output)
        return output

    def restore() -> None:
        if module._compiled_call_impl is call:
            module._compiled_call_impl = original

    module._compiled_call_impl = call
    return restore


class _Hook:
    """A hook as the module holds it: a copy or a pickle of the module gets one that does nothing."""

    def __init__(self, callback: Callable[..., None]) -> None:
        self._callback = callback

    def __call__(self, *args: Any) -> None:
        self._callback(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes anything, returns nothing, and needs no AmpCheck where it is loaded.
        return getattr, (contextlib.nullcontext(), "__exit__")
