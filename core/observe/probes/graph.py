"""What a backward pass starts from, read off its graph: nothing is recorded while the graph is built."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from ampcheck.observe.autograd import graph_behind
from ampcheck.observe.probes.aliases import AliasProbe
from ampcheck.observe.probes.autocast import AutocastProbe, autocast_state
from ampcheck.observe.probes.call_sites import site_at
from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.walk import dtype_name, plain_name, tensor_names
from ampcheck.precision import LOW_PRECISION
from ampcheck.source.lines import callers, calling_site, is_library, is_ours, is_torch, qualified_name, site_of
from ampcheck.trace import AutocastState, OpCall, Operand, Site

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr
_ENGINE: Any = torch.autograd.graph._engine_run_backward

# Nodes of functions that return the widest dtype of their tensors, by type promotion or by autocast's promote list.
_PROMOTING = {
    **{name: name.lower() for name in ("Add", "Sub", "Rsub", "Mul", "Div", "Lerp", "Where", "Maximum", "Minimum")},
    "Cat": "cat",
    "Stack": "stack",
    "Addcmul": "addcmul",
    "Addcdiv": "addcdiv",
}
_LOSSES = ("Loss", "BinaryCrossEntropyWithLogits")
_PRODUCTS = frozenset(
    {"Mm", "Addmm", "Bmm", "Baddbmm", "Addmv", "Mv", "Dot", "Linear", "Convolution", "NativeBatchNorm"}
)
_BY_AUTOCAST = frozenset({"Cat", "Stack", "Addcmul", "Addcdiv"})
_VIEWS = frozenset(
    {"Expand", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Transpose", "T", "Permute", "Slice"}
    | {"Select", "Alias", "Split", "TensorSplit", "Unbind", "Repeat"}
)
_NAME = re.compile(r"(?:Backward)?\d*$")


class GraphProbe:
    """Looks at the graph of each backward pass as it begins, in the thread that entered the probe:

    - ``backward`` itself, with the autocast state around it,
    - calls of ``binary_cross_entropy``, by their nodes,
    - losses and matrix products under autocast outside any module, by the names of their nodes,
    - promoting functions that turned a low-precision tensor into float32 because of a float32 parameter or buffer,
    - whether a saved tensor may be stale without PyTorch noticing. If so, it calls ``suspected(frame)`` after the
      backward pass, with the frame that began it.

    A node's sequence number tells which module and which autocast region it was made in.
    """

    def __init__(
        self,
        model: nn.Module,
        device_type: str,
        autocast: AutocastProbe,
        modules: ModuleProbe,
        aliases: AliasProbe,
        suspected: Callable[[FrameType], None] | None = None,
    ) -> None:
        self.error: Exception | None = None
        self.backwards: list[Site] = []
        self.failure: BaseException | None = None
        """What the latest failing backward pass raised, in any thread."""
        self._aliases = aliases
        self._model = model
        self._storages: dict[int, str] = {}
        self._device_type = device_type
        self._autocast = autocast
        self._modules = modules
        self._suspected = suspected
        self._suspicious = False
        self._counts: dict[OpCall, int] = {}
        self._outside = autocast_state(device_type)
        self._thread = threading.get_ident()
        self._listening = Listening()

    @functools.cached_property
    def _names(self) -> dict[int, str]:
        return tensor_names(self._model)

    @property
    def calls(self) -> tuple[OpCall, ...]:
        return tuple(replace(call, count=count) for call, count in self._counts.items())

    def __enter__(self) -> GraphProbe:
        self._thread = threading.get_ident()
        # If a known region is open, its end is known: outside it, autocast is off.
        self._outside = autocast_state(self._device_type)
        if self._autocast.current is not None:
            self._outside = self._outside._replace(enabled=False)
        self._listening.to(_ENGINE, before=self._begins, after=self._ended, failed=self._failed)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()

    @contained
    def _begins(self, roots: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        with alone():
            site = calling_site()
            if site is not None:
                self.backwards.append(site)
            operands = tuple(Operand(dtype_name(root.dtype), tuple(root.shape)) for root in roots)
            call = OpCall("backward", self._modules.current, autocast_state(self._device_type), operands, (), site)
            self._count(call)
            nodes = graph_behind(roots)
            self._read(nodes)
            self._suspicious = self._aliases.may_be_stale(nodes) or _writes_unmarked(nodes)

    @contained
    def _ended(self, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        if self._suspected is not None and (self._suspicious or self._aliases.stale_under_hooks):
            self._suspicious = self._aliases.stale_under_hooks = False
            self._suspected(next(callers(sys._getframe(1))))

    @contained
    def _failed(self, error: BaseException, *_: Any, **__: Any) -> None:
        # Outside a replay it would keep the model alive.
        if self._suspected is None:
            self.failure = error

    def _read(self, nodes: Iterable[Any]) -> None:
        kinds: dict[type, str] = {}
        for node in nodes:
            kind = kinds.get(type(node))
            if kind is None:
                kind = kinds[type(node)] = _kind(node)
            if kind in _PROMOTING:
                self._promotes(node, kind)
            elif kind == "BinaryCrossEntropy":
                module, state = self._around(node._sequence_nr())
                site = self._line(node, module, "binary_cross_entropy", "BCELoss", "criterion")
                self._count(OpCall("binary_cross_entropy", module, state, (), (), site))
            elif kind in _PRODUCTS or kind.endswith(_LOSSES):
                self._outside_modules(node, kind)

    def _outside_modules(self, node: Any, kind: str) -> None:
        """Record a node that was made under autocast and in no module."""
        if next(self._modules.around(node._sequence_nr()), None) is None:
            _, state = self._around(node._sequence_nr())
            if state.enabled:
                self._count(OpCall(kind, None, state, (), (), None))

    def _promotes(self, node: Any, kind: str) -> None:
        """Record ``node`` if a float32 parameter or buffer turned a low-precision tensor into float32."""
        if _dtype(node, 0) not in (torch.float32, None):
            return
        edges = node.next_functions
        names = [self._parameter(following) for following, _ in edges]
        if not any(names) and all(following is not None for following, _ in edges):
            return
        low: list[Operand] = []
        for (following, index), name in zip(edges, names, strict=True):
            if following is None or name is not None:
                continue
            cast = _source_of_cast(following) if kind in _BY_AUTOCAST else None
            dtype = self._dtype_of(*(cast or (following, index)))
            if dtype is not None and dtype_name(dtype) in LOW_PRECISION:
                low.append(Operand(dtype_name(dtype), (1,)))
        if not low:
            return
        module, state = self._around(node._sequence_nr())
        wide = [Operand("float32", (1,), name) for name in names if name is not None]
        wide += [Operand("float32", (1,), name) for name in self._buffers(node, module)]
        if wide:
            site = self._line(node, module, *(operand.name.rpartition(".")[2] for operand in wide if operand.name))
            self._count(OpCall(_PROMOTING[kind], module, state, (*low, *wide), ("float32",), site))

    def _around(self, sequence: int) -> tuple[str | None, AutocastState]:
        """The innermost module that made node number ``sequence``, and the autocast state at that point."""
        calls = list(self._modules.around(sequence))
        module = next((call.module for call in calls if call.module is not None), None)
        region = self._autocast.at(sequence, self._device_type)
        if region is not None and (not calls or region.since >= calls[0].first):
            return module, region.state
        if calls:
            return module, AutocastState(self._device_type, calls[0].enabled, dtype_name(calls[0].dtype))
        left = self._autocast.left
        return module, self._outside._replace(enabled=self._outside.enabled and (left is None or sequence < left))

    def _dtype_of(self, node: Any, index: int) -> torch.dtype | None:
        """The dtype that ``node`` returned. Older PyTorch shows it only if a module returned it."""
        dtype = _dtype(node, index)
        while dtype is None and node is not None:
            made = node._sequence_nr()
            call = self._modules.returning(made)
            if call is not None and call.outputs:
                return call.outputs[0]
            if _kind(node) not in _VIEWS:
                return None
            node = node.next_functions[0][0]
        return dtype

    def _parameter(self, node: Any) -> str | None:
        """Name of the non-scalar float32 parameter that ``node``, or a chain of views, leads to."""
        while node is not None and _kind(node) in _VIEWS:
            node = node.next_functions[0][0]
        variable = getattr(node, "variable", None)
        if variable is None or variable.dtype is not torch.float32 or not variable.dim():
            return None
        return self._names.get(id(variable))

    def _buffers(self, node: Any, module: str | None) -> Iterator[str]:
        """The float32 buffers that ``node`` took.

        Found by the memory that it saved. If it saved none of theirs: the only one that the module's code names.
        """
        constants = sum(following is None for following, _ in node.next_functions)
        if not constants:
            return
        for slot in ("self", "other"):
            with suppress(AttributeError, RuntimeError):
                name = self._buffer_at(getattr(node, f"_saved_{slot}"))
                if name is not None:
                    yield name
                    return
        owner = self._submodule(module)
        code = getattr(getattr(type(owner), "forward", None), "__code__", None)
        own = [
            name
            for name, buffer in (owner._buffers.items() if owner is not None else ())
            if buffer is not None and buffer.dtype is torch.float32 and buffer.dim()
        ]
        named = [name for name in own if code is not None and name in code.co_names]
        if len(named) == 1:
            yield self._names.get(id(owner._buffers[named[0]]), named[0])  # type: ignore[union-attr]

    def _buffer_at(self, tensor: Any) -> str | None:
        if not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.float32 or not tensor.dim():
            return None
        if not self._storages:
            buffers = [(name, buffer) for name, buffer in self._model.named_buffers() if type(buffer) is torch.Tensor]
            self._storages = {
                buffer.untyped_storage()._cdata: self._names.get(id(buffer), name) for name, buffer in buffers
            }
        return self._storages.get(tensor.untyped_storage()._cdata)

    def _submodule(self, module: str | None) -> nn.Module | None:
        named = self._model.named_modules() if module is not None else ()
        return next((one for name, one in named if plain_name(name) == module), None)

    def _line(self, node: Any, module: str | None, *names: str) -> Site | None:
        """The only line with one of ``names``, in the module's methods or, without a module, in backward's callers; for
        a module of PyTorch's the line that called it."""
        owner = self._submodule(module)
        calls = list(self._modules.around(node._sequence_nr()))
        places = (call.place for call in calls if not _is_machinery(call.place[0].co_filename))
        place = site_at(next(places, None), "call", {})
        if owner is None and place is not None:
            return place
        frames = (frame.f_code for frame in callers(sys._getframe(2)))
        own = [code for code in _methods(type(owner)) if not _is_machinery(code.co_filename)] if owner else []
        codes = [own] if owner else [[code] for code in frames if not is_library(code.co_filename)]
        for group in codes:
            lines = {(code, line) for code in group for one, line in _named_lines(code) if one in names}
            if len(lines) == 1:
                code, line = lines.pop()
                return site_of(code.co_filename, line, qualified_name(code))
        return None if own else place

    def _count(self, call: OpCall) -> None:
        self._counts[call] = self._counts.get(call, 0) + 1


def _methods(kind: type) -> list[CodeType]:
    """The code of a module's forward, then of its other methods but the constructor."""
    names = dict.fromkeys(["forward", *(name for base in kind.__mro__ if base is not nn.Module for name in vars(base))])
    methods = (getattr(getattr(kind, name, None), "__code__", None) for name in names if name != "__init__")
    return [code for code in methods if isinstance(code, CodeType)]


def _is_machinery(file: str) -> bool:
    return is_torch(file) or is_ours(file)


def _kind(node: Any) -> str:
    """``Mul`` for ``MulBackward0``, however this PyTorch spells it."""
    return _NAME.sub("", type(node).__name__)


def _dtype(node: Any, index: int) -> torch.dtype | None:
    metadata = getattr(node, "_input_metadata", None)
    if metadata is not None and index < len(metadata):
        dtype: torch.dtype = metadata[index].dtype
        return dtype
    variable = getattr(node, "variable", None)
    return variable.dtype if isinstance(variable, torch.Tensor) else None


def _source_of_cast(node: Any) -> tuple[Any, int] | None:
    """The input of ``node``, if it is a cast."""
    return node.next_functions[0] if _kind(node) == "ToCopy" and node.next_functions[0][0] is not None else None


def _named_lines(code: CodeType) -> Iterator[tuple[str, int]]:
    """The names that code looks up, each with its line."""
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        starts = instruction.starts_line
        if starts is not None and not isinstance(starts, bool):
            line = starts
        elif isinstance(starts, bool):
            line = getattr(instruction, "line_number", None) or line
        if isinstance(instruction.argval, str):
            yield instruction.argval, line


def _writes_unmarked(nodes: list[Any]) -> bool:
    """Whether a custom function among ``nodes`` may have written to an input without ``mark_dirty``.

    The sign of it: a later node took the same input with its history unchanged.
    """
    kinds = {kind for kind in set(map(type, nodes)) if _writes_to_input(getattr(kind, "_forward_cls", None))}
    for node in [node for node in nodes if type(node) in kinds] if kinds else ():
        taken = {edge for edge in node.next_functions if edge[0] is not None}
        made = node._sequence_nr()
        if any(later._sequence_nr() > made and not taken.isdisjoint(later.next_functions) for later in nodes):
            return True
    return False


@functools.cache
def _writes_to_input(function: Any) -> bool:
    """Whether the source of a custom function's forward writes to one of its arguments in place."""
    forward = getattr(function, "forward", None)
    if forward is None:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if definition is None:
        return False
    given = {argument.arg for argument in (*definition.args.args, definition.args.vararg) if argument is not None}
    for node in ast.walk(definition):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _IN_PLACE.fullmatch(node.func.attr):
            targets = [node.func.value, *node.args[:1]]
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Assign):
            targets = [target for target in node.targets if isinstance(target, ast.Subscript)]
            if isinstance(node.value, ast.Name) and node.value.id in given:
                given |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if any(_root(target) in given for target in targets):
            return True
    return False


def _root(node: ast.expr) -> str | None:
    """The name that a chain of views starts with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_")
