"""The operands of the operation that failed, read from the frames: name, dtype, shape, device, and who made them."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ampcheck.failure.code import MISSING, assigned_before, expressions_at, parents, read
from ampcheck.failure.dtypes import FLOATING
from ampcheck.failure.frames import Place
from ampcheck.observe.walk import dtype_name, module_names, tensor_names
from ampcheck.trace import Site

_CASTS = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "double": "float64"}
# Calls that change neither dtype nor device; the second do change the shape.
_KEEP = frozenset({"contiguous", "detach", "clone"})
_RESHAPE = frozenset({"expand", "flatten", "permute", "reshape", "squeeze", "t", "transpose", "unsqueeze", "view"})
# PyTorch's own frames that only pass a call on.
_PASSING = re.compile(
    r"/torch/(?:nn/modules/module|utils/_contextlib|amp/autocast_mode|overrides|_ops|_library/\w+)\.py$"
)


@dataclass(frozen=True)
class Value:
    """A tensor, or what is known of one that a cast in the failing expression made."""

    dtype: str
    shape: tuple[int, ...] | None
    device: str
    tensor: torch.Tensor | None
    expression: str
    role: str | None = None


@dataclass(frozen=True)
class Operation:
    """The operation that failed: its syntax node, the place it was evaluated at, and its tensors."""

    place: Place
    node: ast.AST
    values: tuple[Value, ...]

    @property
    def dtypes(self) -> set[str]:
        return {value.dtype for value in self.values}


def find_operation(found: Sequence[Place], dtypes: set[str]) -> Operation | None:
    """The innermost operation in the frames that has tensors of the ``dtypes`` the message names (where it names
    any), else the innermost one with a tensor."""
    fallback: Operation | None = None
    for place in reversed(found):
        if _PASSING.search(place.file):
            continue
        operations = [Operation(place, node, values) for node, values in _operations(place)]
        if not operations and fallback is None and place.span is not None:
            calls = [node for node in expressions_at(place) if isinstance(node, ast.Call)]
            fallback = Operation(place, calls[0], ()) if calls else None
        for operation in operations:
            enough = dtypes <= operation.dtypes if dtypes else len(operation.dtypes & FLOATING) > 1
            if enough:
                return operation
        if operations and (fallback is None or not fallback.values):
            fallback = operations[0]
        if place.module is not None and operations and not place.library:
            break
    return fallback


def _operations(place: Place) -> Iterator[tuple[ast.AST, tuple[Value, ...]]]:
    for node in expressions_at(place):
        values = tuple(_tensors(node, place))
        if values:
            yield node, values


def _tensors(node: ast.AST, place: Place) -> Iterator[Value]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            yield from _infer(node.func.value, place, "self")
        for argument in node.args:
            yield from _infer(argument, place)
        for keyword in node.keywords:
            yield from _infer(keyword.value, place, keyword.arg)
    elif isinstance(node, ast.BinOp):
        yield from _infer(node.left, place)
        yield from _infer(node.right, place)
    elif isinstance(node, ast.AugAssign):
        yield from _infer(node.target, place, "destination")
        yield from _infer(node.value, place, "source")
    elif (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
    ):
        yield from _infer(node.targets[0].value, place, "destination")
        yield from _infer(node.value, place, "source")
    elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        statement = parents(place.file).get(node)
        if isinstance(statement, (ast.Assign, ast.AugAssign)):
            yield from _tensors(statement, place)


def _infer(node: ast.expr, place: Place, role: str | None = None) -> Iterator[Value]:
    """The tensors an operand expression stood for, without evaluating it."""
    if isinstance(node, ast.Starred):
        yield from _infer(node.value, place, role)
    elif isinstance(node, (ast.Tuple, ast.List)):
        for element in node.elts:
            yield from _infer(element, place, role)
    elif isinstance(node, ast.Subscript) and not isinstance(read(node, place), torch.Tensor):
        # What an index takes out of a tensor has the tensor's dtype.
        for value in _infer(node.value, place, role):
            yield dataclasses.replace(value, shape=None, expression=ast.unparse(node))
    elif isinstance(node, ast.Call):
        made = _made(node, place)
        if made is not None:
            yield dataclasses.replace(made, role=role)
    elif isinstance(node, ast.UnaryOp):
        yield from _infer(node.operand, place, role)
    elif isinstance(node, ast.BinOp):
        # With a number it keeps a floating dtype.
        for side, other in ((node.left, node.right), (node.right, node.left)):
            if type(read(other, place)) in (int, float):
                for value in _infer(side, place, role):
                    if value.dtype in FLOATING:
                        yield dataclasses.replace(value, shape=None, expression=ast.unparse(node))
    else:
        yield from _flatten(read(node, place), ast.unparse(node), role)


def _flatten(value: Any, expression: str, role: str | None) -> Iterator[Value]:
    if isinstance(value, torch.Tensor):
        yield Value(dtype_name(value.dtype), tuple(value.shape), str(value.device), value, expression, role)
    elif type(value) in (list, tuple):
        for index, element in enumerate(value):
            yield from _flatten(element, f"{expression}[{index}]", role)
    elif type(value) is dict:
        for key, element in value.items():
            yield from _flatten(element, str(key), role)


def _made(node: ast.Call, place: Place) -> Value | None:
    """What a cast such as ``x.half()`` or ``self.weight.to(x.dtype)`` made."""
    if not isinstance(node.func, ast.Attribute):
        return None
    source = next(_infer(node.func.value, place), None)
    if source is None:
        return None
    method, dtype, device, shape = node.func.attr, source.dtype, source.device, source.shape
    arguments = [read(argument, place) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
    if method in _CASTS:
        dtype = _CASTS[method]
    elif method in ("to", "type", "type_as") and arguments and all(argument is not MISSING for argument in arguments):
        for argument in arguments:
            if isinstance(argument, torch.dtype):
                dtype = dtype_name(argument)
            elif isinstance(argument, torch.Tensor):
                dtype, device = dtype_name(argument.dtype), str(argument.device)
            elif isinstance(argument, (torch.device, str)):
                device = str(argument)
    elif method in ("cpu", "cuda"):
        device = method
    elif method in _RESHAPE:
        shape = None
    elif method not in _KEEP:
        return None
    return dataclasses.replace(source, dtype=dtype, device=device, shape=shape, expression=ast.unparse(node))


class Naming:
    """Names of tensors: qualified names in the model, else the user's variables."""

    def __init__(self, root: nn.Module | None, found: Sequence[Place]) -> None:
        self._root = root
        self._tensors = tensor_names(root) if root is not None else {}
        self._modules = module_names(root) if root is not None else {}
        self._found = found

    def owned(self, tensor: torch.Tensor | None) -> str | None:
        """The qualified name of the parameter or buffer that ``tensor`` is, or is a view of."""
        if tensor is None:
            return None
        base = tensor._base
        return self._tensors.get(id(tensor)) or (self._tensors.get(id(base)) if base is not None else None)

    def variable(self, tensor: torch.Tensor | None) -> str | None:
        """The user's variable that holds ``tensor``, in the innermost frame that has one."""
        for place in reversed(self._found):
            if tensor is None or place.library:
                continue
            for name, value in place.names.items():
                if value is tensor:
                    return name
        return None

    def module(self, module: Any) -> str | None:
        return self._modules.get(id(module)) if isinstance(module, nn.Module) else None


def describe(value: Value, naming: Naming, found: Sequence[Place]) -> tuple[dict[str, Any], Site | None]:
    """One operand as JSON values, and the line that made it where the frames tell."""
    owned, variable = naming.owned(value.tensor), naming.variable(value.tensor)
    fact: dict[str, Any] = {
        "name": owned or variable or value.expression,
        "dtype": value.dtype,
        "shape": list(value.shape) if value.shape is not None else None,
        "device": value.device,
    }
    if value.role is not None:
        fact["role"] = value.role
    if value.tensor is not None and dtype_name(value.tensor.dtype) != value.dtype:
        fact["expression"] = value.expression
    if owned is not None:
        fact["kind"] = "parameter" if isinstance(value.tensor, nn.Parameter) else "buffer"
        return fact, None
    if variable is None and found and found[-1].library:
        fact["library"] = True
    made = _producer(value.tensor, naming, found) if value.tensor is not None else None
    if made is None:
        return fact, None
    module, code, site = made
    fact["producer"] = {"module": module, "file": site.file, "line": site.line, "code": code}
    return fact, site


def _producer(tensor: torch.Tensor, naming: Naming, found: Sequence[Place]) -> tuple[str | None, str, Site] | None:
    """The module call or the expression that made ``tensor``, and its line, followed outward from the crash through the
    frames that were handed it; ``None`` where the source does not settle it."""
    for place in reversed(found):
        if _PASSING.search(place.file):
            continue
        if place.in_torch("nn/modules/container.py") and place.names.get("input") is tensor:
            modules = [*place.module._modules.values()] if place.module is not None else []
            index = next((i for i, one in enumerate(modules) if one is place.names.get("module")), 0)
            if index > 0:
                outer = next((p for p in reversed(found) if not p.library), place)
                return naming.module(modules[index - 1]), type(modules[index - 1]).__name__, outer.site("cast")
            continue
        names = [name for name, value in place.names.items() if value is tensor]
        for name in names:
            settled, value = assigned_before(place, name)
            if not settled:
                return None
            if value is not None:
                called = read(value.func, place) if isinstance(value, ast.Call) else None
                line = dataclasses.replace(place, line=value.lineno)
                return naming.module(called), ast.unparse(value), line.site("cast")
        if names or any(_holds(value, tensor) for value in place.names.values()):
            continue
        passed = _passed_call(place)
        if passed is None:
            return None
        return naming.module(read(passed.func, place)), ast.unparse(passed), place.site("cast")
    return None


def _holds(value: Any, tensor: torch.Tensor) -> bool:
    """Whether ``value`` is a frame's ``*args`` or ``**kwargs`` with ``tensor`` in it."""
    values = value.values() if type(value) is dict else value if type(value) is tuple else ()
    return any(one is tensor for one in values)


def _passed_call(place: Place) -> ast.Call | None:
    """``b(x)`` in ``a(b(x))``, where that is the only argument."""
    for node in expressions_at(place):
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            inner = node.args[0]
            if isinstance(inner, ast.Call) and isinstance(read(inner.func, place), nn.Module):
                return inner
    return None


def own_tensors(found: Sequence[Place], naming: Naming, dtypes: set[str]) -> list[dict[str, Any]]:
    """For a check that names no tensor (an RNN's): the innermost module's first parameter in each of ``dtypes``."""
    module = next((place.module for place in reversed(found) if place.module is not None), None)
    described = []
    for tensor in module.parameters(recurse=False) if module is not None else ():
        dtype = dtype_name(tensor.dtype)
        if dtype in dtypes:
            dtypes = dtypes - {dtype}
            described.append(
                describe(Value(dtype, tuple(tensor.shape), str(tensor.device), tensor, ""), naming, found)[0]
            )
    return described


def from_message(
    match: Mapping[str, str | None], dtypes: Mapping[str, str | None], *, written: bool
) -> list[dict[str, Any]]:
    """The operands as far as the message alone tells. ``written``: it is of a write, whose target it names first."""
    told = [(group, dtype) for group in "cab" if (dtype := dtypes.get(group)) is not None]
    names: tuple[str, ...] = (
        ("the target", "the source") if written else ("one operand", "another operand", "a third operand")
    )
    if len(told) == 1:
        names = ("the tensor",)
    found = []
    for (group, dtype), name in zip(told, names, strict=False):
        role = match.get(f"role_{group}")
        found.append({"name": role.lower() if role else name, "dtype": dtype, "shape": None})
    return found
