"""TorchScript: run a trace or script, record what its modules computed, and read its graph."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ampcheck.export.eager import Call, quiet_state, snapshot
from ampcheck.export.graph import Cast, Constant, Exported, TrainingOp, Value, pooled
from ampcheck.export.values import Inputs, tensors_in
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import LISTENING, is_library, is_ours, is_torch, site_of
from ampcheck.trace import OpaqueCall, Site

_DROPOUT = ("aten::dropout", "aten::dropout_", "aten::feature_dropout", "aten::alpha_dropout", "aten::native_dropout")
_DEEPEST = 64
_FACTORY = re.compile(r"aten::(new_)?(empty|zeros|ones|full)(_like|_strided)?$")
_SCALAR_TYPES = {5: torch.float16, 15: torch.bfloat16}
_FRAME = re.compile(r"(?m)^(?P<file>.+?)(?:\((?P<line>\d+)\): (?P<function>\S+)|:(?P<single>\d+):\d+)\s*$")


class TorchScript(Exported):
    """A module from ``torch.jit.trace`` or ``torch.jit.script``, in memory or from a file."""

    practice = "torch"

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self._module = module
        traced = isinstance(module, torch.jit._trace.TopLevelTracedModule) or _looks_traced(module)
        self.format = f"TorchScript {'trace' if traced else 'script'}"
        self.traced = traced

    @property
    def module(self) -> nn.Module:
        return self._module

    def arity(self) -> tuple[int, int] | None:
        forward: Any = self._module.forward
        arguments = forward.schema.arguments[1:]
        return sum(not argument.has_default_value() for argument in arguments), len(arguments)

    def run(self, inputs: Inputs) -> Any:
        with quiet():
            return self._module(*inputs.args, **inputs.kwargs)

    def calls(self, inputs: Inputs, seed: int) -> tuple[list[Call], str | None]:
        try:
            copy = _copied(self._module)
        except RuntimeError:
            return self._calls_by_scope(inputs, seed), None
        if len(self.names) > 1 and not any(True for _ in copy.children()):
            return [], "the modules were inlined when the graph was frozen"
        recorder = _Recorder(self.named)
        _insert_taps(copy)
        given = inputs.copied()
        with recorder, torch.no_grad(), quiet_state(seed, copy):
            recorder.enter("", given.tensors)
            try:
                outputs = snapshot(self._run_copy(copy, given))
            except RuntimeError as error:
                return recorder.calls, f"the exported model stopped in {recorder.path or 'the model'}: {_line(error)}"
            recorder.leave("", outputs)
        return recorder.calls, None

    def _calls_by_scope(self, inputs: Inputs, seed: int) -> list[Call]:
        """The calls by the scopes of the inlined graph: saving cannot copy a graph with Python calls."""
        graph: Any = self._module.inlined_graph
        values = [
            (
                value,
                _scopes(node),
                [_scopes(use.user) if use.user.kind() != "prim::Return" else None for use in value.uses()],
            )
            for node in graph.nodes()
            for value in node.outputs()
            if value.type().isSubtypeOf(torch._C.TensorType.get())
            and node.kind() not in ("prim::GetAttr", "prim::Constant")
        ]
        given = inputs.copied()
        taken = [[_scopes(use.user) for use in value.uses()] for value in list(graph.inputs())[1:]]
        seen: list[Value] = []
        notes = {str(index): (scopes, users) for index, (_, scopes, users) in enumerate(values)}
        recorder = _Recorder(self.named, lambda name, tensor: seen.append(Value(tensor, *notes[name])))
        for index, (value, _, _) in enumerate(values):
            label = graph.insertConstant(str(index))
            label.node().moveBefore(value.node())
            graph.create("ampcheck_tap::leave", [label, value], 0).insertAfter(value.node())
        function = torch._C._create_function_from_graph("ampcheck_scopes", graph)
        outside = [Value(tensor, ("",), users) for tensor, users in zip(given.tensors, taken, strict=False)]
        with recorder, torch.no_grad(), quiet_state(seed, self._module), quiet():
            function(self._module._c, *given.args, **given.kwargs)
        return pooled([*outside, *seen], self.named)

    @staticmethod
    def _run_copy(copy: torch.jit.ScriptModule, inputs: Inputs) -> Any:
        with quiet():
            return copy(*inputs.args, **inputs.kwargs)

    @functools.cached_property
    def _nodes(self) -> list[tuple[str, Any]]:
        """Every node with the module it is in, nodes inside blocks included."""
        return [(self.named(step.module), step.node) for step in _walk(self._module)]

    def in_float32(self) -> Exported | None:
        try:
            return TorchScript(_copied(self._module).float())
        except RuntimeError:
            return None

    def constants(self) -> Iterator[Constant]:
        for module, node in self._nodes:
            if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
                yield Constant(module, node.t("value"), _site(node))
            elif _FACTORY.match(node.kind()):
                yield Constant(module, None, _site(node))

    def opaque_calls(self) -> Iterator[OpaqueCall]:
        for module, node in self._nodes:
            if node.kind() == "prim::PythonOp":
                function = node.hasAttribute("Subgraph") or "autograd" in str(node.pyobj())
                yield OpaqueCall("autograd-function" if function else "python", node.pyname(), module, _site(node))
            elif not node.kind().startswith(("prim::", "onnx::")) and node.schema() == "(no schema)":
                yield OpaqueCall("no-schema", node.kind(), module, _site(node))

    def casts(self) -> Iterator[Cast]:
        for module, node in self._nodes:
            if node.kind() in ("aten::to", "aten::_to_copy"):
                for value in node.inputs():
                    number = value.toIValue() if value.node().kind() == "prim::Constant" else None
                    if isinstance(number, int) and not isinstance(number, bool) and number in _SCALAR_TYPES:
                        yield Cast(module, dtype_name(_SCALAR_TYPES[number]), _site(node))
                        break

    def training_ops(self) -> Iterator[TrainingOp]:
        for module, node in self._nodes:
            inputs = list(node.inputs())
            if node.kind() in _DROPOUT and _true(inputs[2]):
                yield TrainingOp("dropout", module, _site(node))
            elif node.kind() in ("aten::batch_norm", "aten::instance_norm") and _true(inputs[5]):
                yield TrainingOp(node.kind().removeprefix("aten::"), module, _site(node))


@dataclass
class _Recorder:
    """Collects what the taps report. The taps are ops, registered only as long as they are needed."""

    named: Callable[[str], str]
    on_value: Callable[[str, Tensor], None] | None = None
    calls: list[Call] = field(default_factory=list)
    _stack: list[tuple[str, list[Tensor]]] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)
    _library: Any = None

    def __enter__(self) -> _Recorder:
        self._library = torch.library.Library("ampcheck_tap", "DEF")
        for name in ("enter", "leave"):
            # An op without outputs stays in the graph only if it may have any side effect.
            self._library.define(f"{name}(str name, Any value) -> ()", alias_analysis="CONSERVATIVE")
            self._library.impl(name, getattr(self, name), "CompositeExplicitAutograd")
        return self

    def __exit__(self, *_: object) -> None:
        self._library._destroy()

    @property
    def path(self) -> str:
        return self._stack[-1][0] if self._stack else ""

    def enter(self, name: str, value: Any) -> None:
        """Begin a call. ``name`` is the module's path, relative to the calling module if it begins with a dot."""
        path = f"{self.path}{name}".removeprefix(".") if name.startswith(".") else name
        self._stack.append((path, [tensor.detach().clone() for tensor in tensors_in(value)]))

    def leave(self, name: str, value: Any) -> None:
        if self.on_value is not None:
            self.on_value(name, value.detach().clone())
            return
        path, inputs = self._stack.pop()
        path = self.named(path)
        outputs = [tensor.detach().clone() for tensor in tensors_in(value)]
        self.calls.append(Call(path, "", self._counts[path], inputs, outputs))
        self._counts[path] += 1


def _copied(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    with quiet():
        buffer = io.BytesIO()
        torch.jit.save(module, buffer)
        buffer.seek(0)
        copy: torch.jit.ScriptModule = torch.jit.load(buffer)
    copy.train(module.training)
    return copy


class _Owner(NamedTuple):
    """A module inside the exported one.

    ``within`` is its path from the module whose method is being read (with a dot before it), or from the outermost
    module if it was passed in as an argument.
    """

    path: str
    within: str
    script: Any


class _Step(NamedTuple):
    """A node, the module it is in and, if it calls another module, that one."""

    module: str
    graph: Any
    node: Any
    called: _Owner | None


def _walk(module: Any) -> Iterator[_Step]:
    """Yield every node that a call of ``module`` reaches."""
    script = getattr(module, "_c", module)
    yield from _walk_method(_Owner("", "", script), script._get_method("forward").graph, [], 0)


def _walk_method(owner: _Owner, graph: Any, arguments: list[_Owner | None], depth: int) -> Iterator[_Step]:
    """Yield every node that a method reaches.

    A trace passes a module with two parents, as an argument, to the parent that it is not an attribute of.
    """
    own = _Owner(owner.path, "", owner.script)
    known = {
        value.debugName(): module
        for value, module in zip(graph.inputs(), [own, *arguments], strict=False)
        if module is not None
    }
    yield from _walk_block(own, graph, graph, known, depth)


def _walk_block(own: _Owner, graph: Any, block: Any, known: dict[str, _Owner], depth: int) -> Iterator[_Step]:
    for node in block.nodes():
        called, *arguments = (
            [_owner(value, known) for value in node.inputs()] if node.kind() == "prim::CallMethod" else [None]
        )
        yield _Step(own.path, graph, node, called)
        if called is not None and depth < _DEEPEST:
            inner = called.script._get_method(node.s("name")).graph
            handed = [module and module._replace(within=module.path) for module in arguments]
            yield from _walk_method(called, inner, handed, depth + 1)
        for nested in node.blocks():
            yield from _walk_block(own, graph, nested, known, depth)


def _owner(value: Any, known: dict[str, _Owner]) -> _Owner | None:
    """The module that a value in the graph is: ``GetAttr[name="0"](GetAttr[name="blocks"](self))``."""
    names: list[str] = []
    while value.node().kind() == "prim::GetAttr":
        names.append(value.node().s("name"))
        value = next(iter(value.node().inputs()))
    owner = known.get(value.debugName())
    if owner is None:
        return None
    path, within, script = owner
    for name in reversed(names):
        path, within, script = f"{path}.{name}" if path else name, f"{within}.{name}", script.getattr(name)
    return _Owner(path, within, script) if isinstance(script, torch._C.ScriptModule) else None


def _insert_taps(module: torch.jit.ScriptModule) -> None:
    """Tap what goes in and what comes out, around every call of a submodule. Modules of one type may share a graph."""
    calls = {
        (id(step.graph), step.node.output().debugName()): step
        for step in _walk(module)
        if step.called is not None and step.called.within
    }
    for _, graph, node, called in calls.values():
        assert called is not None
        arguments = [value for value in list(node.inputs())[1:] if value.type().kind() != "ClassType"]
        packed = graph.create("prim::TupleConstruct", arguments, 1)
        packed.insertBefore(node)
        packed.output().setType(torch._C.TupleType([argument.type() for argument in arguments]))
        for name, value in (("enter", packed.output()), ("leave", node.output())):
            label = graph.insertConstant(called.within)
            label.node().moveBefore(node)
            tap = graph.create(f"ampcheck_tap::{name}", [label, value], 0)
            if name == "enter":
                tap.insertBefore(node)
            else:
                tap.insertAfter(node)


def _scopes(node: Any) -> tuple[str, ...]:
    """``("", "b1", "b1.n")`` for the scope ``__module.b1/__module.b1.n``."""
    scopes = [scope.removeprefix("__module.").removeprefix("__module") for scope in node.scopeName().split("/")]
    return tuple(dict.fromkeys(["", *scopes]))


def _looks_traced(module: torch.jit.ScriptModule) -> bool:
    """Whether this is a trace: it has no control flow, and comes from a Python stack, not from one file."""
    nodes = [step.node for step in _walk(module)]
    if any(node.kind() in ("prim::If", "prim::Loop") for node in nodes):
        return False
    return any("_trace.py" in node.sourceRange() for node in nodes if node.kind().startswith("aten::"))


def _site(node: Any) -> Site | None:
    """The user's innermost line in a node's Python stack, else the innermost line outside PyTorch."""
    outside: Site | None = None
    for match in _FRAME.finditer(node.sourceRange()):
        file, line = match["file"].strip(), int(match["line"] or match["single"])
        if file.startswith('File "'):
            file = file.removeprefix('File "').rstrip('",')
        if is_ours(file) and file != LISTENING:
            break
        if not is_library(file):
            return site_of(file, line, match["function"] or "forward")
        if outside is None and not is_torch(file):
            outside = site_of(file, line, match["function"] or "forward")
    return outside


def _true(value: Any) -> bool:
    return value.node().kind() == "prim::Constant" and value.toIValue() is True


def _line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if "Error" in line]
    return (lines[-1] if lines else str(error).splitlines()[0]).strip()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence TorchScript's deprecation warning, which whoever made the export has seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
