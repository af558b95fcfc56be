"""What each module call looks like: autocast around it, dtypes in and out, and the graph nodes made in it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.call_sites import Instruction, site_at
from ampcheck.observe.probes.listening import Listening, disguised, live
from ampcheck.observe.tensors import tensors_in
from ampcheck.observe.walk import dtype_name, is_sharded, is_sharded_itself, module_names
from ampcheck.source.lines import is_ours, is_torch
from ampcheck.trace import AutocastState, ModuleCall, Site

_CALL: Any = nn.Module._wrapped_call_impl

Called = Callable[[nn.Module, tuple[Any, ...]], None]
Returned = Callable[[nn.Module, tuple[Any, ...], Any], None]
Failed = Callable[[nn.Module, Exception], None]


class LoggedCall(NamedTuple):
    """A recorded module call, in plain values.

    The nodes made in it have the sequence numbers from ``first`` up to ``last``; ``place`` is the instruction that made
    the call.
    """

    outputs: tuple[torch.dtype, ...]
    own: tuple[str, ...]
    last: int
    thread: int
    module: str | None
    type: str
    enabled: bool
    dtype: torch.dtype
    cache: bool
    region: int | None
    grad_enabled: bool
    task: int
    leaf: bool
    inputs: tuple[torch.dtype, ...]
    first: int
    place: tuple[CodeType, int]


class ModuleProbe:
    """Records the calls of all modules while it is active.

    It stores nothing on a module, registers no hook and keeps no tensor: it reads dtypes at once, because a later
    in-place operation would change what a kept tensor shows. Calls that look alike are counted together.
    """

    def __init__(
        self, model: nn.Module, device_type: str, autocast: AutocastProbe, entry: nn.Module | None = None
    ) -> None:
        self.error: Exception | None = None
        self._log: list[tuple[Any, ...]] = []
        self._names = module_names(model)
        if entry is not None and type(entry).__name__ == _COMPILED:
            self._names[id(entry)] = ""
        self._sharded = is_sharded(model)
        self._device_type = device_type
        self._autocast = autocast
        self._local = _Local()
        self._thread = threading.get_ident()
        self._listening = Listening()
        self.tools: tuple[Any, ...] = ()

    @property
    def calls(self) -> tuple[ModuleCall, ...]:
        """The calls, in the order of their first return."""
        counts: dict[tuple[Any, ...], int] = {}
        log = [LoggedCall(*entry) for entry in self._log]
        # Dynamo may leave the call of the wrapped module to Python: count only the wrapper's.
        wrapped = {one.module for one in log if one.type == _COMPILED}
        for one in log:
            if one.type != _COMPILED and one.module in wrapped:
                continue
            key = (
                one.module, one.type, one.enabled, one.dtype, one.cache, one.region, one.grad_enabled, one.task != -1,
                one.inputs, one.outputs, one.leaf, one.own,
            )  # fmt: skip
            counts[key] = counts.get(key, 0) + 1
        return tuple(self._call(key, count) for key, count in counts.items())

    def _call(self, key: tuple[Any, ...], count: int) -> ModuleCall:
        module, kind, enabled, dtype, cache, region, grad_enabled, in_backward, inputs, outputs, leaf, own = key
        state = AutocastState(self._device_type, enabled, dtype_name(dtype), cache)
        return ModuleCall(
            module, kind, state, region, grad_enabled, in_backward, _floating(inputs), _floating(outputs), count, leaf,
            own,
        )  # fmt: skip

    @property
    def called(self) -> dict[str, Site]:
        """The line that called each module first, without PyTorch's own."""
        places: dict[str, Instruction] = {}
        for entry in self._log:
            call = LoggedCall(*entry)
            file = call.place[0].co_filename
            if call.module is not None and not is_torch(file) and not is_ours(file):
                places.setdefault(call.module, call.place)
        sites = {module: site_at(place, "call", {"module": module}) for module, place in places.items()}
        return {module: site for module, site in sites.items() if site is not None}

    @property
    def current(self) -> str | None:
        """Qualified name of the innermost module of the model that the running thread is in."""
        return next((entry[1] for entry in reversed(self._local.stack) if entry[1] is not None), None)

    def around(self, sequence: int) -> Iterator[LoggedCall]:
        """The calls, innermost first, in which the thread that entered the probe made node number ``sequence``."""
        for entry in self._log:
            if entry[_FIRST] <= sequence < entry[_LAST] and entry[_THREAD] == self._thread:
                yield LoggedCall(*entry)

    def returning(self, sequence: int) -> LoggedCall | None:
        """The innermost call that returned while this node was the latest."""
        return next((call for call in self.around(sequence) if call.last == sequence + 1), None)

    def __enter__(self) -> ModuleProbe:
        self._thread = threading.get_ident()
        own = self._own_dtypes if self._sharded else None
        self.tools = (
            self._log.append, self._thread, self._names, self._local, self._autocast.local, self._device_type, own
        )  # fmt: skip
        _probes.append(self)
        self._listening.by(_CALL, _watched)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _probes[:] = [probe for probe in _probes if probe is not self]
        self._listening.end()
        # A hook of the model may end the step inside the calls around it.
        for entry in reversed(self._local.stack):
            if entry[1] is not None:
                self._log.append(((), (), torch._C._autograd._get_sequence_nr(), *entry))
        self._local.stack.clear()

    def _own_dtypes(self, module: nn.Module) -> tuple[str, ...]:
        # Only during the call are parameters whole, and in the dtype that forward computes in. A module that is sharded
        # itself has been sharded again by now.
        if is_sharded_itself(module):
            return ()
        return tuple(sorted(set(floating_dtypes(p for p in module._parameters.values() if p is not None))))


_COMPILED = "OptimizedModule"
_FIRST, _LAST, _THREAD = (LoggedCall._fields.index(name) for name in ("first", "last", "thread"))


def on_module_calls(before: Called | None, after: Returned | None = None) -> Callable[[], None]:
    """Call the functions around every call of a module outside compiled code.

    ``before(module, args)`` runs before it, ``after(module, args, output)`` after it. Returns a function that ends
    this; it may be called again.
    """
    listener, listening = (before, after), Listening()

    def end() -> None:
        _callbacks[:] = [one for one in _callbacks if one is not listener]
        listening.end()

    try:
        _callbacks.append(listener)
        listening.by(_CALL, _watched)
    except BaseException:
        end()
        raise
    return end


def on_module_failures(failed: Failed) -> Callable[[], None]:
    """Call ``failed(module, error)`` when a call of a module raises, in each module that the error leaves.

    A call that does not raise is not slowed down. Returns a function that ends this; it may be called again.
    """
    listening = Listening()

    def end() -> None:
        _failures[:] = [one for one in _failures if one is not failed]
        listening.end()

    try:
        _failures.append(failed)
        listening.by(_CALL, _watched)
    except BaseException:
        end()
        raise
    return end


# What is active now. A call reads these when it gets to them, so that a step can begin inside a call.
_probes: list[ModuleProbe] = []
_callbacks: list[tuple[Called | None, Returned | None]] = []
_failures: list[Failed] = []
live += [_probes, _callbacks, _failures]


class _Local(threading.local):
    """The calls that each thread is in, outermost first.

    They hold the fields of a ``LoggedCall`` that are known by then, the module's name second.
    """

    def __init__(self) -> None:
        self.stack: list[tuple[Any, ...]] = []


# In place of `nn.Module._wrapped_call_impl`, in its guise. `_watched` replaces the strings by their values. Except for
# callbacks it calls no Python function: a model may be at the recursion limit, and Dynamo would compile those it meets.
def _template(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    callbacks: Any = "callbacks"
    probes: Any = "probes"
    tools: Any = "tools"
    set_eval_frame: Any = "set_eval_frame"
    failures: Any = "failures"
    tensor, no_mode, caller, sequence, ident, is_enabled, get_dtype, is_cached, grad_enabled, graph_task = tools
    called: Any = ()
    if callbacks:
        compiling = set_eval_frame(None)
        # What compiled code calls is not called by the loop.
        called = (*callbacks,) if compiling is None else ()
        for before, _ in called:
            if before is not None:
                before(self, args)
        set_eval_frame(compiling)
    entered = []
    for probe in (*probes,):
        record, thread, names, local, regions, device_type, own = probe.tools
        try:
            here, name = ident(), names.get(id(self))
            if probe.error is not None or (here != thread and name is None and "_is_replica" not in self.__dict__):
                continue
            with no_mode():
                pending: list[Any] = [*args]
                dtypes: list[Any] = []
                seen: dict[int, Any] = {}
                pending.reverse()
                while pending:
                    value = pending.pop()
                    if isinstance(value, tensor):
                        dtypes.append(value.dtype)
                    elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
                        seen[id(value)] = value
                        pending.extend(reversed(value.values() if isinstance(value, dict) else value))
                frame, inside = caller(1), regions.stack
                entry = (
                    here, name, type(self).__name__, is_enabled(device_type), get_dtype(device_type), is_cached(),
                    inside[-1] if inside else None, grad_enabled(), graph_task(), not self._modules, (*dtypes,),
                    sequence(), (frame.f_code, frame.f_lasti),
                )  # fmt: skip
                frame = value = None
            stack = local.stack
            stack.append(entry)
            entered.append((probe, stack, entry))
        except RecursionError:
            pass
        except Exception as error:  # noqa: BLE001 - our fault, not the training's
            error.__traceback__ = error.__context__ = None
            probe.error = probe.error or error
    result = None
    try:
        if self._compiled_call_impl is None:
            result = self._call_impl(*args, **kwargs)
        else:
            result = self._compiled_call_impl(*args, **kwargs)
    except Exception as error:
        for failed in (*failures,):
            failed(self, error)
        raise
    finally:
        for probe, stack, entry in entered:
            record, thread, names, local, regions, device_type, own = probe.tools
            try:
                if not stack or stack.pop() is not entry:
                    continue
                # Gradients do not pass through a data transform or a metric: neither is part of the training forward.
                graph = entry[1] is not None or entry[3]
                with no_mode():
                    pending, seen = [result], {}
                    dtypes = []
                    while pending:
                        value = pending.pop()
                        if isinstance(value, tensor):
                            dtypes.append(value.dtype)
                            graph = graph or value.requires_grad
                        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
                            seen[id(value)] = value
                            pending.extend(reversed(value.values() if isinstance(value, dict) else value))
                    for value in args:
                        graph = graph or (isinstance(value, tensor) and value.requires_grad)
                    if graph:
                        record(((*dtypes,), () if own is None else own(self), sequence(), *entry))
            except RecursionError:
                pass
            except Exception as error:  # noqa: BLE001 - our fault, not the training's
                error.__traceback__ = error.__context__ = None
                probe.error = probe.error or error
    if called:
        compiling = set_eval_frame(None)
        for _, after in called:
            if after is not None:
                after(self, args, result)
        set_eval_frame(compiling)
    return result


# The same where nobody waits for more than failures: it costs what the original costs.
def _plain_template(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    try:
        if self._compiled_call_impl is None:
            return self._call_impl(*args, **kwargs)
        return self._compiled_call_impl(*args, **kwargs)
    except Exception as error:
        failures: Any = "failures"
        for failed in (*failures,):
            failed(self, error)
        raise


def _watched(code: CodeType, listeners: list[Any]) -> CodeType:
    line = max(line for _, _, line in code.co_lines() if line is not None)
    values = {"callbacks": _callbacks, "probes": _probes, "failures": _failures, "tools": _TOOLS}
    template = _template if _callbacks or _probes else _plain_template
    return disguised(template, code, {**values, "set_eval_frame": _set_eval_frame}, line)


_set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
_TOOLS = (
    torch.Tensor, torch._C.DisableTorchFunction, sys._getframe, torch._C._autograd._get_sequence_nr,
    threading.get_ident, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.is_autocast_cache_enabled,
    torch.is_grad_enabled, torch._C._current_graph_task_id,
)  # fmt: skip


def floating_dtypes(values: Iterable[Any]) -> tuple[str, ...]:
    """Dtypes of the floating-point tensors in nested lists, tuples and dicts, in order."""
    return _floating(tensor.dtype for tensor in tensors_in(list(values)))


def _floating(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(dtype_name(dtype) for dtype in dtypes if dtype.is_floating_point)
