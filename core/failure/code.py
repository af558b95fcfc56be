"""The source behind a frame: the expression that was being evaluated, and the values of its plain names.

Runs no user code: names, attributes and items are looked up without calling anything.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
from collections.abc import Iterator
from types import CodeType, ModuleType
from typing import Any, Final

import torch
from torch import nn

from ampcheck.failure.frames import Frame
from ampcheck.source.lines import site_of
from ampcheck.trace import Role, Site

# The deprecated classes, whose names contain the device type.
DEPRECATED: Final[dict[Any, str]] = {getattr(torch, device).amp.autocast: device for device in ("cuda", "cpu")}


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()

_TENSOR_FACTS = frozenset({"dtype", "device", "shape", "data", "grad", "T", "mT", "requires_grad"})


@functools.lru_cache(maxsize=16)
def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def tree_of(file: str) -> ast.Module | None:
    """The syntax tree of a file, or ``None`` if its source is not available."""
    return _parse("".join(linecache.getlines(file)))


@functools.lru_cache(maxsize=16)
def _parents(tree: ast.Module) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def parents(file: str) -> dict[ast.AST, ast.AST]:
    """The parent of each node in a file's tree."""
    tree = tree_of(file)
    return _parents(tree) if tree is not None else {}


def function_at(frame: Frame) -> ast.AST | None:
    """The innermost function (or the module) that contains the line of ``frame``."""
    tree = tree_of(frame.file)
    if tree is None:
        return None
    holding = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _covers(node, frame.line)
    ]
    return max(holding, key=lambda node: node.lineno, default=tree)


def site_in(file: str, line: int, role: Role = "call") -> Site:
    """The site of a line in a file, with the function that contains it."""
    holder = function_at(Frame(file, line, ""))
    return site_of(file, line, getattr(holder, "name", "<module>"), role)


def expressions_at(frame: Frame) -> Iterator[ast.AST]:
    """The node that was being evaluated or, if Python does not tell, all nodes that begin on the line, outermost
    first."""
    tree = tree_of(frame.file)
    if tree is None:
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.expr, ast.stmt)):
            continue
        if frame.span is None:
            if node.lineno == frame.line or (isinstance(node, ast.stmt) and _head_covers(node, frame.line)):
                yield node
        elif (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == frame.span:
            yield node


def _covers(node: ast.stmt | ast.expr, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _head_covers(node: ast.stmt, line: int) -> bool:
    return not hasattr(node, "body") and _covers(node, line)


def read(node: ast.AST, frame: Frame) -> Any:
    """The value of a plain expression when the frame was left, or ``MISSING``."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        for scope in (frame.names, frame.globals, vars(builtins)):
            if node.id in scope:
                return scope[node.id]
        return MISSING
    if isinstance(node, ast.Attribute):
        return _attribute(read(node.value, frame), node.attr)
    if isinstance(node, ast.Subscript):
        holder, key = read(node.value, frame), read(node.slice, frame)
        if type(holder) in (dict, list, tuple) and isinstance(key, (str, int)):
            try:
                return holder[key]
            except (KeyError, IndexError):
                return MISSING
    return MISSING


def _attribute(holder: Any, name: str) -> Any:
    if holder is MISSING:
        return MISSING
    if isinstance(holder, torch.Tensor):
        return (
            getattr(holder, name) if name in _TENSOR_FACTS and type(holder).__module__.startswith("torch") else MISSING
        )
    if isinstance(holder, torch.device):
        return getattr(holder, name, MISSING)
    if isinstance(holder, nn.Module):
        for table in (holder._parameters, holder._buffers, holder._modules):
            if name in table:
                return table[name]
    if isinstance(holder, (ModuleType, type)):
        return inspect.getattr_static(holder, name, MISSING)
    own = getattr(holder, "__dict__", {})
    if name in own:
        return own[name]
    value = inspect.getattr_static(type(holder), name, MISSING)
    return MISSING if hasattr(value, "__get__") else value


def assignments(frame: Frame, target: str) -> list[ast.Assign | ast.AnnAssign]:
    """Assignments to ``target`` in the file of ``frame``: for a plain name those in its function, else at the top
    level; for an attribute (``"self.kwargs"``) all, by whatever name the instance has there."""
    if "." in target:
        return _assigned(tree_of(frame.file), target)
    return _assigned(function_at(frame), target) or _assigned(tree_of(frame.file), target, top_level=True)


def _assigned(scope: ast.AST | None, target: str, *, top_level: bool = False) -> list[ast.Assign | ast.AnnAssign]:
    if scope is None:
        return []
    nodes = ast.iter_child_nodes(scope) if top_level else ast.walk(scope)
    found: list[ast.Assign | ast.AnnAssign] = []
    for node in nodes:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        else:
            continue
        if any(_is_target(one, target) for one in targets):
            found.append(node)
    return found


def _is_target(node: ast.expr, target: str) -> bool:
    holder, _, attribute = target.rpartition(".")
    if holder and holder.isidentifier() and isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.attr == attribute
    return ast.unparse(node) == target


def assigned_before(frame: Frame, name: str) -> tuple[bool, ast.expr | None]:
    """The value last assigned to ``name`` when the line of ``frame`` ran: ``(True, value)``, ``(True, None)`` for an
    argument of the function, ``(False, None)`` if it depends on branches or loops."""
    function = function_at(frame)
    if getattr(function, "name", "<module>") != frame.function.rpartition(".")[2]:
        return False, None
    block: ast.AST | None = function
    path: list[tuple[list[ast.stmt], int, ast.AST]] = []
    while block is not None:
        step = _child_at(block, frame.line)
        if step is None:
            break
        body, index = step
        path.append((body, index, block))
        block = body[index]
    for body, index, owner in reversed(path):
        for statement in reversed(body[:index]):
            settled, value = _binds(statement, name)
            if not settled or value is not None:
                return settled, value
        loop = isinstance(owner, (ast.For, ast.While, ast.AsyncFor))
        if loop and any(not settled or value is not None for settled, value in (_binds(one, name) for one in body)):
            return False, None
        if isinstance(owner, (ast.For, ast.AsyncFor)) and name in _stored(owner.target):
            return False, None
        if isinstance(owner, (ast.With, ast.AsyncWith)) and any(
            item.optional_vars is not None and name in _stored(item.optional_vars) for item in owner.items
        ):
            return False, None
    return isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)), None


def _child_at(owner: ast.AST, line: int) -> tuple[list[ast.stmt], int] | None:
    for field in ("body", "orelse", "finalbody"):
        body: Any = getattr(owner, field, None)
        for index, statement in enumerate(body if isinstance(body, list) else ()):
            if isinstance(statement, ast.stmt) and statement.lineno <= line <= (statement.end_lineno or 0):
                return body, index
    return None


def _binds(statement: ast.stmt, name: str) -> tuple[bool, ast.expr | None]:
    """Whether the value that ``statement`` binds to ``name`` is certain, and that value."""
    if isinstance(statement, ast.Assign) and any(_is_name(target, name) for target in statement.targets):
        return True, statement.value
    if isinstance(statement, ast.AnnAssign) and _is_name(statement.target, name) and statement.value is not None:
        return True, statement.value
    if isinstance(statement, ast.AugAssign):
        return True, None
    if isinstance(statement, (ast.With, ast.AsyncWith)):
        for inner in reversed(statement.body):
            settled, value = _binds(inner, name)
            if not settled or value is not None:
                return settled, value
        return True, None
    return name not in _stored(statement), None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _stored(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


def definition_of(code: CodeType) -> ast.FunctionDef | None:
    """The ``def`` that ``code`` was compiled from."""
    tree = tree_of(code.co_filename)
    for node in ast.walk(tree) if tree is not None else ():
        # The code of a decorated function begins at its first decorator.
        if isinstance(node, ast.FunctionDef) and code.co_firstlineno == min(
            [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
        ):
            return node
    return None


def returned(function: Any) -> tuple[str, list[ast.expr]]:
    """The file of a Python function and the expressions it returns."""
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    definition = definition_of(code) if isinstance(code, CodeType) else None
    if definition is None or code is None:
        return "", []
    returns = (node for node in ast.walk(definition) if isinstance(node, ast.Return))
    return code.co_filename, [node.value for node in returns if node.value is not None]
