"""The operands of the failed operation, read from the frames: name, dtype, shape, device, and what made them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ampcheck.failure.code import MISSING, assigned_before, expressions_at, parents, read
from ampcheck.failure.frames import Frame
from ampcheck.observe.walk import dtype_name, module_names, tensor_names
from ampcheck.precision import FLOATING
from ampcheck.trace import FailedOperand, Producer

_CASTS = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "double": "float64"}
# Calls that change neither dtype nor device; those in the second set do change the shape.
_KEEP = frozenset({"contiguous", "detach", "clone"})
_RESHAPE = frozenset({"expand", "flatten", "permute", "reshape", "squeeze", "t", "transpose", "unsqueeze", "view"})
# PyTorch's own functions that only pass a call on.
_PASSING = re.compile(
    r"/torch/(?:nn/modules/module|utils/_contextlib|amp/autocast_mode|overrides|_ops|_library/\w+)\.py$"
)


@dataclass(frozen=True)
class Value:
    """A tensor, or what is known about one that a cast in the failing expression made."""

    dtype: str
    shape: tuple[int, ...] | None
    device: str
    tensor: torch.Tensor | None
    expression: str
    role: str | None = None


@dataclass(frozen=True)
class Operation:
    """The failed operation: its syntax node, the frame that evaluated it, and its tensors."""

    frame: Frame
    node: ast.AST
    values: tuple[Value, ...]

    @property
    def dtypes(self) -> set[str]:
        return {value.dtype for value in self.values}


def find_operation(found: Sequence[Frame], dtypes: set[str]) -> Operation | None:
    """The innermost operation in the frames that has tensors of the ``dtypes`` in the message (if it names any), else
    the innermost one with a tensor."""
    fallback: Operation | None = None
    for frame in reversed(found):
        if _PASSING.search(frame.file):
            continue
        operations = [Operation(frame, node, values) for node, values in _operations(frame)]
        if not operations and fallback is None and frame.span is not None:
            calls = [node for node in expressions_at(frame) if isinstance(node, ast.Call)]
            fallback = Operation(frame, calls[0], ()) if calls else None
        for operation in operations:
            enough = dtypes <= operation.dtypes if dtypes else len(operation.dtypes & FLOATING) > 1
            if enough:
                return operation
        if operations and (fallback is None or not fallback.values):
            fallback = operations[0]
        if frame.module is not None and operations and not frame.library:
            break
    return fallback


def _operations(frame: Frame) -> Iterator[tuple[ast.AST, tuple[Value, ...]]]:
    for node in expressions_at(frame):
        values = tuple(_tensors(node, frame))
        if values:
            yield node, values


def _tensors(node: ast.AST, frame: Frame) -> Iterator[Value]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            yield from _infer(node.func.value, frame, "self")
        for argument in node.args:
            yield from _infer(argument, frame)
        for keyword in node.keywords:
            yield from _infer(keyword.value, frame, keyword.arg)
    elif isinstance(node, ast.BinOp):
        yield from _infer(node.left, frame)
        yield from _infer(node.right, frame)
    elif isinstance(node, ast.AugAssign):
        yield from _infer(node.target, frame, "destination")
        yield from _infer(node.value, frame, "source")
    elif (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
    ):
        yield from _infer(node.targets[0].value, frame, "destination")
        yield from _infer(node.value, frame, "source")
    elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        statement = parents(frame.file).get(node)
        if isinstance(statement, (ast.Assign, ast.AugAssign)):
            yield from _tensors(statement, frame)


def _infer(node: ast.expr, frame: Frame, role: str | None = None) -> Iterator[Value]:
    """The tensors that an operand expression stood for, found without evaluating it."""
    if isinstance(node, ast.Starred):
        yield from _infer(node.value, frame, role)
    elif isinstance(node, (ast.Tuple, ast.List)):
        for element in node.elts:
            yield from _infer(element, frame, role)
    elif isinstance(node, ast.Subscript) and not isinstance(read(node, frame), torch.Tensor):
        # Indexing a tensor keeps its dtype.
        for value in _infer(node.value, frame, role):
            yield replace(value, shape=None, expression=ast.unparse(node))
    elif isinstance(node, ast.Call):
        made = _made(node, frame)
        if made is not None:
            yield replace(made, role=role)
    elif isinstance(node, ast.UnaryOp):
        yield from _infer(node.operand, frame, role)
    elif isinstance(node, ast.BinOp):
        # Arithmetic with a number keeps a floating dtype.
        for side, other in ((node.left, node.right), (node.right, node.left)):
            if type(read(other, frame)) in (int, float):
                for value in _infer(side, frame, role):
                    if value.dtype in FLOATING:
                        yield replace(value, shape=None, expression=ast.unparse(node))
    else:
        yield from _flatten(read(node, frame), ast.unparse(node), role)


def _flatten(value: Any, expression: str, role: str | None) -> Iterator[Value]:
    if isinstance(value, torch.Tensor):
        yield Value(dtype_name(value.dtype), tuple(value.shape), str(value.device), value, expression, role)
    elif type(value) in (list, tuple):
        for index, element in enumerate(value):
            yield from _flatten(element, f"{expression}[{index}]", role)
    elif type(value) is dict:
        for key, element in value.items():
            yield from _flatten(element, str(key), role)


def _made(node: ast.Call, frame: Frame) -> Value | None:
    """What a cast such as ``x.half()`` or ``self.weight.to(x.dtype)`` made."""
    if not isinstance(node.func, ast.Attribute):
        return None
    source = next(_infer(node.func.value, frame), None)
    if source is None:
        return None
    method, dtype, device, shape = node.func.attr, source.dtype, source.device, source.shape
    arguments = [read(argument, frame) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
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
    return replace(source, dtype=dtype, device=device, shape=shape, expression=ast.unparse(node))


class Naming:
    """Names of tensors: qualified names in the model, else the user's variables."""

    def __init__(self, root: nn.Module | None, found: Sequence[Frame]) -> None:
        self._root = root
        self._tensors = tensor_names(root) if root is not None else {}
        self._modules = module_names(root) if root is not None else {}
        # In evaluation a copy of the model may fail.
        copy = next((frame.module for frame in found if frame.module is not None), None)
        if copy is not None and copy is not root and type(copy) is type(root):
            self._tensors = tensor_names(copy) | self._tensors
            self._modules = module_names(copy) | self._modules
        self._found = found

    def owned(self, tensor: torch.Tensor | None) -> str | None:
        """The qualified name of ``tensor`` if it is a parameter or buffer, or a view of one."""
        if tensor is None:
            return None
        base = tensor._base
        return self._tensors.get(id(tensor)) or (self._tensors.get(id(base)) if base is not None else None)

    def variable(self, tensor: torch.Tensor | None) -> str | None:
        """The user's variable that holds ``tensor``, in the innermost frame that has one."""
        for frame in reversed(self._found):
            if tensor is None or frame.library:
                continue
            for name, value in frame.names.items():
                if value is tensor:
                    return name
        return None

    def module(self, module: Any) -> str | None:
        return self._modules.get(id(module)) if isinstance(module, nn.Module) else None


def operand_of(value: Value, naming: Naming, found: Sequence[Frame]) -> FailedOperand:
    """What is known about a tensor, and what made it, if the frames tell."""
    owned, variable = naming.owned(value.tensor), naming.variable(value.tensor)
    variable = variable or _given(value.tensor, found)
    cast = value.tensor is not None and dtype_name(value.tensor.dtype) != value.dtype
    operand = FailedOperand(
        name=owned or variable or value.expression,
        dtype=value.dtype,
        shape=value.shape,
        device=value.device,
        role=value.role,
        expression=value.expression if cast else None,
    )
    if owned is not None:
        return replace(operand, stored="parameter" if isinstance(value.tensor, nn.Parameter) else "buffer")
    return replace(
        operand,
        library=variable is None and bool(found) and found[-1].library,
        producer=_producer(value.tensor, naming, found) if value.tensor is not None else None,
    )


def _producer(tensor: torch.Tensor, naming: Naming, found: Sequence[Frame]) -> Producer | None:
    """The module call or the expression that made ``tensor``, and its line, followed from the crash outward through the
    frames that got it as an argument; ``None`` if the source leaves it open."""
    for frame in reversed(found):
        if _PASSING.search(frame.file):
            continue
        if frame.in_torch("nn/modules/container.py") and frame.names.get("input") is tensor:
            modules = [*frame.module._modules.values()] if frame.module is not None else []
            index = next((i for i, one in enumerate(modules) if one is frame.names.get("module")), 0)
            if index > 0:
                outer = next((p for p in reversed(found) if not p.library), frame)
                made_by = modules[index - 1]
                return Producer(naming.module(made_by), type(made_by).__name__, outer.site("cast"))
            continue
        names = [name for name, value in frame.names.items() if value is tensor]
        for name in names:
            settled, value = assigned_before(frame, name)
            if not settled:
                return None
            if value is not None:
                called = read(value.func, frame) if isinstance(value, ast.Call) else None
                line = replace(frame, line=value.lineno)
                return Producer(naming.module(called), ast.unparse(value), line.site("cast"))
        if names or any(_holds(value, tensor) for value in frame.names.values()):
            continue
        passed = _passed_call(frame)
        if passed is None:
            return None
        return Producer(naming.module(read(passed.func, frame)), ast.unparse(passed), frame.site("cast"))
    return None


def _holds(value: Any, tensor: torch.Tensor) -> bool:
    """Whether ``value`` is a frame's ``*args`` or ``**kwargs`` with ``tensor`` in it."""
    values = value.values() if type(value) is dict else value if type(value) is tuple else ()
    return any(one is tensor for one in values)


def _given(tensor: torch.Tensor | None, found: Sequence[Frame]) -> str | None:
    """The expression in the user's line that became ``tensor``, if a library got it from there as its only argument."""
    inside: Frame | None = None
    for frame in reversed(found):
        if _PASSING.search(frame.file):
            continue
        if not frame.library:
            calls = [node for node in expressions_at(frame) if isinstance(node, ast.Call)]
            if inside is None or inside.in_torch("nn/modules/container.py") or len(calls) != 1 or calls[0].keywords:
                return None
            held = any(value is tensor for value in inside.names.values())
            (argument,) = calls[0].args if len(calls[0].args) == 1 else (None,)
            known = argument is None or isinstance(argument, ast.Starred) or read(argument, frame) is not MISSING
            return ast.unparse(argument) if held and argument is not None and not known else None
        inside = frame
    return None


def _passed_call(frame: Frame) -> ast.Call | None:
    """``b(x)`` in ``a(b(x))``, if that is the only argument."""
    for node in expressions_at(frame):
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            inner = node.args[0]
            if isinstance(inner, ast.Call) and isinstance(read(inner.func, frame), nn.Module):
                return inner
    return None


def unread(operation: Operation) -> list[str]:
    """The operands that the line computes itself, so that no variable holds them."""
    node = operation.node
    if isinstance(node, ast.Call):
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
    elif isinstance(node, ast.BinOp):
        given = [node.left, node.right]
    else:
        # A write to an item is known by its target.
        statement = parents(operation.frame.file).get(node) if isinstance(node, ast.Subscript) else node
        given = [statement.value] if isinstance(statement, (ast.Assign, ast.AugAssign)) else []
    computed = (one for one in given if isinstance(one, (ast.Call, ast.BinOp, ast.UnaryOp)))
    return [ast.unparse(one) for one in computed if next(_infer(one, operation.frame), None) is None]


def own_tensors(found: Sequence[Frame], naming: Naming, dtypes: set[str]) -> list[FailedOperand]:
    """For a check that names no tensor (an RNN's): the innermost module's first parameter in each of ``dtypes``."""
    module = next((frame.module for frame in reversed(found) if frame.module is not None), None)
    operands: list[FailedOperand] = []
    for tensor in module.parameters(recurse=False) if module is not None else ():
        dtype = dtype_name(tensor.dtype)
        if dtype in dtypes:
            dtypes = dtypes - {dtype}
            value = Value(dtype, tuple(tensor.shape), str(tensor.device), tensor, "")
            operands.append(operand_of(value, naming, found))
    return operands


def from_message(said: Mapping[str, str | None], dtypes: Mapping[str, str], *, written: bool) -> list[FailedOperand]:
    """The operands as far as the message alone tells. ``written``: it is about a write and names the target first."""
    told = [(group, dtypes[group]) for group in "cab" if group in dtypes]
    names: tuple[str, ...] = (
        ("the target", "the source") if written else ("one operand", "another operand", "a third operand")
    )
    if len(told) == 1:
        names = ("the tensor",)
    return [
        FailedOperand((said.get(f"role_{group}") or name).lower(), dtype)
        for (group, dtype), name in zip(told, names, strict=False)
    ]
