"""Run the eager model and see, module by module, what it computes and what of that the dispatcher cannot see."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

from ampcheck.export.values import Inputs, tensors_in
from ampcheck.observe.tensors import same_values
from ampcheck.observe.walk import dtype_name, module_names
from ampcheck.source.lines import is_library, is_ours, is_torch, qualified_name, site_of
from ampcheck.trace import Site

_UNINITIALIZED = ("empty", "new_empty")
_FACTORIES = (*_UNINITIALIZED, "zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
_LOW = {torch.float16, torch.bfloat16}


@dataclass
class Call:
    """One call of a module: the tensors that went in and came out, as they were at the time."""

    module: str
    type: str
    index: int
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True)
class Untracked:
    """A tensor whose content no op computed from the inputs, as it was when first seen.

    ``target`` is the function called there (``package.module:function``).
    """

    key: tuple[str, int, str, int]
    module: str
    site: Site | None
    value: Tensor
    target: str | None
    foreign: bool


@dataclass(frozen=True)
class Read:
    """A Python number or truth value read from a tensor that depends on the inputs, before op ``position``."""

    module: str
    site: Site | None
    value: object
    position: int


@dataclass
class Observation:
    """A run of the eager model.

    ``casts`` counts casts to low precision by module and dtype; ``written`` are the buffers that the run changed.
    """

    inputs: Inputs
    outputs: object = None
    untracked: dict[tuple[str, int, str, int], Untracked] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    ops: list[tuple[str, str]] = field(default_factory=list)
    casts: Counter[tuple[str, str]] = field(default_factory=Counter)
    written: frozenset[str] = frozenset()


def observe(model: nn.Module, inputs: Inputs, seed: int) -> Observation:
    """Run ``model`` once without gradients, and put buffers and random state back. The model's own errors pass through.

    Tensors are followed by the memory they lie in: what an op computes from something that depends on the inputs
    depends on them too. Lines are found with ``sys.settrace``, in Python code outside PyTorch.
    """
    given = inputs.copied()
    seen = Observation(inputs)
    probe = _Dataflow(model, given, seen)
    with torch.no_grad(), quiet_state(seed, model) as written:
        with _inside_modules(model, probe), probe, _lines(probe, _packages(model)):
            seen.outputs = model(*given.args, **given.kwargs)
        seen.outputs = snapshot(seen.outputs)
        seen.written = frozenset(written())
    return seen


def modules_run(model: nn.Module, inputs: Inputs, seed: int) -> tuple[Any, list[Call]]:
    """Run ``model`` once without gradients; return its outputs and the calls of its modules.

    The calls hold what the modules took and returned, in the order in which they ended.
    """
    names = module_names(model)
    counts: Counter[str] = Counter()
    stack: list[list[Tensor]] = []
    calls: list[Call] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append([tensor.detach().clone() for tensor in tensors_in((args, kwargs))])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = names[id(module)]
        outputs = [tensor.detach().clone() for tensor in tensors_in(output)]
        calls.append(Call(name, type(module).__name__, counts[name], stack.pop(), outputs))
        counts[name] += 1

    with _module_hooks(model, enter, leave):
        return eager_outputs(model, inputs, seed), calls


def eager_outputs(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    """What ``model`` returns without gradients. Buffers and random state are put back."""
    given = inputs.copied()
    with torch.no_grad(), quiet_state(seed, model):
        return snapshot(model(*given.args, **given.kwargs))


def outputs_rounded_otherwise(model: nn.Module, inputs: Inputs, seed: int) -> Any:
    """What ``model`` returns if noise as small as rounding is added to what its float32 and float64 modules compute."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(tensor: Tensor) -> Tensor:
        if tensor.dtype not in (torch.float32, torch.float64) or not tensor.numel():
            return tensor
        step = 4 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
        return tensor + step * torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        leaf = next(module.children(), None) is None
        return pytree.tree_map_only(Tensor, nudge, output) if leaf else None

    with _module_hooks(model, lambda *_: None, leave):
        return eager_outputs(model, inputs, seed)


@contextlib.contextmanager
def quiet_state(seed: int, *models: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Seed the random state, and afterwards put it back, with the buffers of ``models``.

    Yields a function that returns the names of the buffers that have changed meanwhile.
    """
    owned = [(name, buffer) for model in models for name, buffer in model.named_buffers()]
    kept = [(name, buffer, buffer.detach().clone()) for name, buffer in owned if buffer is not None]
    attributes = [(m, n, b) for model in models for m in model.modules() for n, b in m._buffers.items()]
    replaceable = [item for item in attributes if not isinstance(item[0], torch.jit.ScriptModule)]

    def written() -> list[str]:
        names = [name for name, buffer, before in kept if not same(buffer, before)]
        now = {name: b for model in models for name, b in model.named_buffers()}
        return [
            *names,
            *(name for name, buffer, _ in kept if now.get(name, buffer) is not buffer and name not in names),
        ]

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield written
        finally:
            with torch.no_grad():
                for module, name, buffer in replaceable:
                    if module._buffers.get(name) is not buffer:
                        module._buffers[name] = buffer
                for _, buffer, before in kept:
                    if not same(buffer, before):
                        buffer.copy_(before)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same in shape, dtype and every value, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and same_values(a, b)


def snapshot(value: Any) -> Any:
    """Copy nested outputs, so that later in-place writes do not reach them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(snapshot(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(snapshot(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return {key: snapshot(item) for key, item in vars(value).items()}
    return value


def _inside_modules(model: nn.Module, probe: _Dataflow) -> AbstractContextManager[None]:
    """Tell the probe which module is running, and show it what modules return."""
    names = module_names(model)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        probe.module.append(names[id(module)])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            probe.meet(tensor, None)
        probe.module.pop()

    return _module_hooks(model, enter, leave)


@contextlib.contextmanager
def _module_hooks(model: nn.Module, enter: Callable[..., None], leave: Callable[..., Any]) -> Iterator[None]:
    """Put hooks around the calls of every module."""
    handles: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule) or module is model:
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Dataflow(TorchDispatchMode):
    """Tracks which memory depends on the inputs, and keeps new tensors that do not."""

    def __init__(self, model: nn.Module, inputs: Inputs, seen: Observation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module: list[str] = []
        self._seen = seen
        self._depends: dict[int, bool] = {}
        self._blank: dict[int, Tensor] = {}
        self._alive: list[object] = []
        self._derived: set[int] = set()
        self._ordinals: Counter[tuple[str, int, str]] = Counter()
        for tensor in (*model.parameters(), *model.buffers()):
            self._mark(tensor, False)
        for tensor in inputs.tensors:
            self._mark(tensor, True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        written = _written(func, args, kwargs)
        for tensor in given:
            if not any(tensor is other for other in written):
                self.meet(tensor, None)
        name = func._schema.name.removeprefix("aten::")
        factory = name.removesuffix("_like") in _FACTORIES or name in ("empty_strided", "new_empty_strided")
        depends = not factory and any(self._depends.get(_memory(tensor), False) for tensor in given)
        derived = any(_memory(tensor) in self._derived for tensor in given)
        position = len(self._seen.ops)
        self._seen.ops.append((str(func), self._here))
        out = func(*args, **kwargs)
        if name in ("_local_scalar_dense", "equal") and depends:
            self._seen.reads.append(Read(self._here, _site(), out, position))
        for tensor in written:
            self._blank.pop(_memory(tensor), None)
            self._mark(tensor, depends or self._depends.get(_memory(tensor), False))
        for tensor in tensors_in(out):
            memory = _memory(tensor)
            new = memory not in self._depends
            if new or depends:
                self._mark(tensor, depends)
            if new and factory and memory:
                self._blank[memory] = tensor.detach().clone()
            if derived and not depends:
                self._derived.add(memory)
            elif new and not depends and not name.startswith("empty") and name not in _UNINITIALIZED:
                self._keep(tensor, _site(), str(func), None, foreign=False)
        if name == "_to_copy" and given and given[0].dtype not in _LOW:
            for tensor in tensors_in(out):
                if tensor.dtype in _LOW:
                    self._seen.casts[self._here, dtype_name(tensor.dtype)] += 1
        return out

    @property
    def _here(self) -> str:
        return self.module[-1] if self.module else ""

    def meet(self, tensor: Tensor, frame: tuple[FrameType, int] | None) -> None:
        """Keep a tensor that no op made, or whose blank memory something other than an op has filled."""
        memory = _memory(tensor)
        if not memory:
            return
        known = memory in self._depends
        blank = self._blank.get(memory)
        if known and blank is None:
            return
        if blank is not None and (blank.shape != tensor.shape or same(tensor.detach(), blank)):
            return
        self._blank.pop(memory, None)
        self._mark(tensor, False)
        frame = frame or _place()
        if frame is None:
            self._keep(tensor, None, "", None, foreign=True)
            return
        site = _site_of(*frame)
        self._keep(tensor, site, "", _called(frame[0], site.code), foreign=True)

    def _mark(self, tensor: Tensor, depends: bool) -> None:
        memory = _memory(tensor)
        if memory:
            if memory not in self._depends:
                self._alive.append(tensor.untyped_storage())
            self._depends[memory] = depends

    def _keep(self, tensor: Tensor, site: Site | None, op: str, target: str | None, *, foreign: bool) -> None:
        where = (site.file if site else "", site.line if site else 0, op or self._here)
        key = (*where, self._ordinals[where])
        self._ordinals[where] += 1
        self._derived.add(_memory(tensor))
        with _disable_current_modes():
            value = tensor.detach().clone()
        self._seen.untracked[key] = Untracked(key, self._here, site, value, target, foreign)


@contextlib.contextmanager
def _lines(probe: _Dataflow, packages: frozenset[str]) -> Iterator[None]:
    """Show the probe every tensor that a line of Python leaves in a local variable or returns.

    The lines are the user's, and those of the ``packages`` that the model's classes come from.
    """
    last: dict[int, int] = {}
    wanted: dict[str, bool] = {}

    def of_interest(file: str, module: str) -> bool:
        ours = is_torch(file) or is_ours(file) or file.startswith("<")
        return not ours and (module.partition(".")[0] in packages or not is_library(file))

    def look(values: object, frame: FrameType) -> None:
        with _disable_current_modes():
            for value in values if isinstance(values, (list, tuple)) else (values,):
                if isinstance(value, Tensor):
                    probe.meet(value, (frame, last.get(id(frame), frame.f_lineno)))

    def local(frame: FrameType, event: str, result: Any) -> Any:
        if event == "line":
            for value in list(frame.f_locals.values()):
                look(value, frame)
            last[id(frame)] = frame.f_lineno
        elif event == "return":
            last[id(frame)] = frame.f_lineno
            look(result, frame)
            last.pop(id(frame), None)
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in wanted:
            wanted[file] = of_interest(file, str(frame.f_globals.get("__name__", "")))
        if not wanted[file]:
            return None
        last[id(frame)] = frame.f_lineno
        return local

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield
    finally:
        sys.settrace(before)


def _packages(model: nn.Module) -> frozenset[str]:
    return frozenset(type(module).__module__.partition(".")[0] for module in model.modules())


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an op writes to, by its schema."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_in(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _place() -> tuple[FrameType, int] | None:
    """The innermost user frame below AmpCheck's own, else the innermost one outside PyTorch, with its line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    outside: FrameType | None = None
    while frame is not None and not is_ours(frame.f_code.co_filename):
        file = frame.f_code.co_filename
        if not is_library(file):
            return frame, frame.f_lineno
        if outside is None and not is_torch(file):
            outside = frame
        frame = frame.f_back
    return (outside, outside.f_lineno) if outside else None


def _site() -> Site | None:
    place = _place()
    return _site_of(*place) if place else None


def _site_of(frame: FrameType, line: int) -> Site:
    return site_of(frame.f_code.co_filename, line, qualified_name(frame.f_code))


def _called(frame: FrameType, code: str) -> str | None:
    """The function that a line calls, as a place where it can be exchanged: ``package.module:name``.

    Skips functions of PyTorch and NumPy, and modules of the model.
    """
    for dotted in re.findall(r"([A-Za-z_][\w.]*)\s*\(", code):
        first, *rest = dotted.split(".")
        if first in frame.f_locals or first not in frame.f_globals:
            continue
        owner = found = frame.f_globals[first]
        path, module = first, frame.f_globals.get("__name__", "")
        for name in rest:
            owner, found = found, getattr(found, name, None)
            path = f"{path}.{name}"
        if rest and isinstance(owner, type(sys)) and sys.modules.get(owner.__name__) is owner:
            module, path = owner.__name__, rest[-1]
        home = str(getattr(found, "__module__", None) or module)
        if callable(found) and not isinstance(found, type) and home.partition(".")[0] not in ("torch", "numpy"):
            return f"{module}:{path}"
    name = qualified_name(frame.f_code)
    if "." not in name and name in frame.f_globals:
        return f"{frame.f_globals.get('__name__', '')}:{name}"
    return None
