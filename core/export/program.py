"""`torch.export` programs: run them node by node, and read their graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ampcheck.export.eager import Call, quiet_state
from ampcheck.export.graph import Cast, Constant, Exported, TrainingOp, Value, Visible, pooled
from ampcheck.export.values import Inputs, other_size, tensors_in
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import is_library, is_ours, is_torch, site_of
from ampcheck.trace import OpaqueCall, Site

_DROPOUT = {"aten::dropout", "aten::dropout_", "aten::feature_dropout", "aten::alpha_dropout", "aten::native_dropout"}
_NORM = {
    "aten::batch_norm",
    "aten::instance_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_functional",
    "aten::native_batch_norm",
}
_CASTS = {"aten::to", "aten::_to_copy"}
_LOW = (torch.float16, torch.bfloat16)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


class Program(Exported):
    """An ``ExportedProgram``, in memory or from a ``.pt2`` file."""

    format = "torch.export program"
    practice = "torch"

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._module: fx.GraphModule = program.module()
        self._placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}

    @property
    def module(self) -> nn.Module:
        return self._module

    def arity(self) -> tuple[int, int] | None:
        args, kwargs = _arguments(self._program.call_spec.in_spec)
        return len(args) + len(kwargs), len(args) + len(kwargs)

    def declared(self) -> tuple[Visible, ...]:
        found = []
        for name in self._program.graph_signature.user_inputs:
            node = self._placeholders.get(name) if isinstance(name, str) else None
            value = node.meta.get("val") if node is not None else None
            if isinstance(value, Tensor):
                shape = tuple(size if isinstance(size, int) else None for size in value.shape)
                found.append(Visible(str(name), value.dtype, shape))
        return tuple(found)

    def resized_shapes(self, inputs: Inputs, *, double: bool = False) -> list[tuple[int, ...]] | None:
        values = [self._placeholders[v.name].meta["val"] for v in self.declared()]
        tensors = inputs.tensors
        if len(values) != len(tensors):
            return None
        chosen: dict[Any, int] = {}
        for value, tensor in zip(values, tensors, strict=True):
            for size, given in zip(value.shape, tensor.shape, strict=True):
                expression = getattr(getattr(size, "node", None), "expr", None)
                if expression is not None and getattr(expression, "is_Symbol", False):
                    bounds = self._program.range_constraints.get(expression)
                    chosen.setdefault(expression, other_size(given, bounds, double=double))
        if not chosen:
            return None
        shapes = []
        for value in values:
            sizes = (size if isinstance(size, int) else int(size.node.expr.subs(chosen)) for size in value.shape)
            shapes.append(tuple(sizes))
        return shapes

    def run(self, inputs: Inputs) -> Any:
        return self._module(*inputs.args, **inputs.kwargs)

    def calls(self, inputs: Inputs, seed: int) -> tuple[list[Call], str | None]:
        given = inputs.copied()
        interpreter = _Recorder(self._module, self._stack)
        spec = self._module._in_spec
        flat = _flat(given, spec)
        with torch.no_grad(), quiet_state(seed, self._module):
            try:
                interpreter.run(*flat, enable_io_processing=False)
            except Exception as error:  # noqa: BLE001 - whatever a user's op raises
                return pooled(interpreter.values, self.named), f"the program stopped: {str(error).splitlines()[0]}"
        return pooled(interpreter.values, self.named), None

    def constants(self) -> Iterator[Constant]:
        named = self._program.graph_signature.inputs_to_lifted_tensor_constants
        for placeholder, name in named.items():
            value = self._program.constants.get(name)
            if isinstance(value, Tensor):
                users = list(self._placeholders[placeholder].users)
                yield Constant(self._path(users[0]) if users else "", value, _site(users[0]) if users else None)

    def opaque_calls(self) -> Iterator[OpaqueCall]:
        for node in self._calls():
            target = node.target
            known = isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
            if isinstance(target, torch._ops.HigherOrderOperator) and "autograd_function" in target.name():
                yield OpaqueCall("autograd-function", target.name(), self._path(node), _site(node))
            elif not known and getattr(target, "__module__", "") not in (operator.__name__, "_operator", "math"):
                name = getattr(target, "__name__", str(target))
                if not str(getattr(target, "__module__", "")).startswith(("torch", "builtins")):
                    yield OpaqueCall("python", name, self._path(node), _site(node))

    def casts(self) -> Iterator[Cast]:
        for node in self._calls():
            if _name(node) in _CASTS:
                dtype = next((v for v in (*node.args[1:], *node.kwargs.values()) if isinstance(v, torch.dtype)), None)
                if dtype in _LOW:
                    assert dtype is not None
                    yield Cast(self._path(node), dtype_name(dtype), _site(node))

    def training_ops(self) -> Iterator[TrainingOp]:
        for node in self._calls():
            if _name(node) in _DROPOUT and len(node.args) > 2 and node.args[2] is True:
                yield TrainingOp("dropout", self._path(node), _site(node))
            elif _name(node) in _NORM and len(node.args) > 5 and node.args[5] is True:
                yield TrainingOp("batch_norm", self._path(node), _site(node))

    def written(self) -> set[str]:
        """The buffers whose new values the program returns."""
        return set(self._program.graph_signature.buffers_to_mutate.values())

    def _stack(self, node: fx.Node) -> tuple[str, ...]:
        return self.chain(_parts(node))

    def _path(self, node: fx.Node) -> str:
        return self.named(self._stack(node)[-1])

    def _calls(self) -> Iterator[fx.Node]:
        """Yield the nodes that call something, those of inner graphs included."""
        for module in self._program.graph_module.modules():
            if isinstance(module, fx.GraphModule):
                for node in module.graph.nodes:
                    if node.op == "call_function":
                        yield node


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value that leaves the module it was made in."""

    def __init__(self, module: fx.GraphModule, stack: Callable[[fx.Node], tuple[str, ...]]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._stack = stack
        self.values: list[Value] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module" and "guards" in str(n.target):
            return None
        result = super().run_node(n)
        if n.op in ("call_function", "placeholder", "call_module"):
            users = [None if user.op == "output" else self._stack(user) for user in n.users]
            for tensor in tensors_in(result):
                self.values.append(Value(tensor.detach().clone(), self._stack(n), users))
        return result


def _flat(inputs: Inputs, spec: Any) -> list[Any]:
    kwargs = {key: inputs.kwargs[key] for key in _arguments(spec)[1] if key in inputs.kwargs}
    leaves: list[Any] = pytree.tree_leaves((inputs.args, kwargs))
    return leaves


def _arguments(spec: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the form ``spec``, with numbers in place of tensors."""
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return args, kwargs


def _parts(node: fx.Node) -> list[str]:
    """The modules of a node by name: ``bs.0`` even if it is written ``L['self'].bs[0]``."""
    names = []
    for name, _ in (node.meta.get("nn_module_stack") or {}).values():
        name = re.sub(r"@\d+", "", str(name))
        name = re.sub(r"^L\['\w+'\]\.?", "", name)
        name = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", name)
        names.append(name.replace("_modules.", "").strip("."))
    return [name for name in names if name]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _site(node: fx.Node) -> Site | None:
    """The user's innermost line in a node's stack, else the innermost one outside PyTorch."""
    outside: Site | None = None
    for match in reversed(list(_FRAME.finditer(node.meta.get("stack_trace") or ""))):
        file, line = match["file"], int(match["line"])
        if is_ours(file):
            continue
        if not is_library(file):
            return site_of(file, line, match["function"])
        if outside is None and not is_torch(file):
            outside = site_of(file, line, match["function"])
    return outside
