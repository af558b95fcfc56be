"""Find the statements of a program that compute with tensors, by their source and by what the variables hold."""

from __future__ import annotations

import ast
import contextlib
import dis
import inspect
import io
import math
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from threading import Thread
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ampcheck.observe.state import copied_iterator
from ampcheck.observe.tensors import tensors_in
from ampcheck.source.lines import is_library, is_ours
from ampcheck.source.syntax import FUNCTIONS, LOOPS, blocks

_NAMES = (ast.Name, ast.Attribute)
# Parts of the names of functions that report or save, and do not compute.
_TELLING = ("log", "save", "print", "plot", "write", "visual", "display", "record", "report", "checkpoint", "dump")
# The methods of tensors and modules that write.
_IN_PLACE = re.compile(r"[a-z]\w*[a-z\d]_|_foreach_\w+_|data|load_state_dict")
# In-place methods that change no number.
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})
# A larger tensor is data.
_MOST_ELEMENTS = 2**22
# Parts of the names of methods that build a module.
_BUILDING = ("add_module", "register_", "load_", "compile")


class Statements:
    """Chooses the statements that compute with tensors, by what the variables hold.

    ``training``: nothing has failed. ``numbers``: also those that computed what is not finite.
    """

    def __init__(self, names: Mapping[str, Any], *, training: bool, numbers: bool = False) -> None:
        self.names = names
        self._training, self._numbers = training, numbers
        self._graphs = {name for name, value in names.items() if _carries_graph(value)}
        if numbers:
            self._graphs |= {name for name, value in names.items() if is_not_finite(value)}
        self._traced = True

    def begins(self, node: ast.AST) -> bool:
        """Whether a step begins at a node: a loop, a function, or a block of something that is not PyTorch's."""
        if isinstance(node, ast.With):
            return not any(map(self._computes_under, node.items))
        return isinstance(node, (ast.Module, *FUNCTIONS, *LOOPS))

    def up_to(self, path: Sequence[ast.AST], start: int, *, beyond: bool = False) -> list[ast.stmt] | None:
        """The statements in ``path[start]`` up to the last of the path, which is always taken, and those ``beyond`` it.

        Branches on the way are taken, and ``with`` blocks entered.
        """
        statements: list[ast.stmt] | None = None
        for outer, inner in zip(reversed(path[start:-1]), reversed(path[start + 1 :]), strict=True):
            block = next((one for one in blocks(outer) if any(node is inner for node in one)), None)
            if block is None:
                return None
            at = next(i for i, node in enumerate(block) if node is inner)
            if statements is None:
                last = _last(inner)
                if last is None and not isinstance(inner, ast.Raise):
                    return None
                statements = [last] if last is not None else []
                self._needs(inner)
            elif isinstance(inner, ast.With):
                items = [item for item in inner.items if self._computes_under(item)]
                statements = [ast.copy_location(ast.With(items, statements), inner)] if items else statements
            after = [taken for node in block[at + 1 :] if (taken := self.of(node)) is not None] if beyond else []
            before = [taken for node in reversed(block[:at]) if (taken := self.of(node)) is not None]
            statements = [*reversed(before), *statements, *after]
        if statements is not None and self._numbers:
            return [*self._not_repeated(statements[:-1], set()), *statements[-1:]]
        return statements

    def _not_repeated(self, nodes: Iterable[ast.stmt], made: set[str]) -> Iterator[ast.stmt]:
        """Leave out what has changed the variables already: a number that it changes once more is another number.

        These are writes to tensors that no statement before them makes, and the steps of optimizers.
        """
        for node in nodes:
            if self._changes(node, made):
                continue
            for block in blocks(node):
                block[:] = self._not_repeated(block, made)
            if isinstance(node, (ast.With, ast.If, *LOOPS)) and not node.body:
                node.body = [ast.copy_location(ast.Pass(), node)]
            made.update(ast.unparse(one) for one in ast.walk(node) if _is_stored(one))
            yield node

    def _changes(self, node: ast.stmt, made: set[str]) -> bool:
        target: ast.expr | None = None
        if isinstance(node, ast.AugAssign):
            target = node.target
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0].value
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            root = self._root(call.func.value) if isinstance(call.func, ast.Attribute) else None
            if isinstance(root, (torch.optim.Optimizer, torch.amp.GradScaler)):
                return name in ("step", "update")
            if not _IN_PLACE.fullmatch(name) or name in _HARMLESS or not isinstance(call.func, ast.Attribute):
                return False
            target = call.func.value if isinstance(root, torch.Tensor) or not call.args else call.args[0]
        if target is None:
            return False
        value = self._root(target)
        of_tensor = isinstance(value, torch.Tensor) and value.grad_fn is None
        return of_tensor and not any(name in made for name in _names_of(target))

    def carried(self, statements: Iterable[ast.stmt]) -> list[str]:
        """What detaches each variable with a graph that statements may read before they give it a value."""
        found: dict[str, None] = {}
        self._read_first(statements, set(), found)
        return list(found)

    def _read_first(self, nodes: Iterable[ast.AST], given: set[str], found: dict[str, None]) -> set[str]:
        """Add to ``found``, and return what the nodes have given a value in any case, with what was before."""
        for node in nodes:
            inner = list(blocks(node))
            inside = {id(one) for block in inner for outer in block for one in ast.walk(outer)}
            names = [one for one in ast.walk(node) if isinstance(one, _NAMES) and id(one) not in inside]
            for one in names:
                name = ast.unparse(one)
                detached = _detached(name, self._value(one)) if isinstance(one.ctx, ast.Load) else None
                if detached is not None and name not in given:
                    found[f"{name} = {detached}"] = None
            given = given | {ast.unparse(one) for one in names if isinstance(one.ctx, ast.Store)}
            ends = [self._read_first(block, given, found) for block in inner]
            if isinstance(node, ast.If):
                given = ends[0] & ends[1] if len(ends) == 2 else given
            elif ends:
                given = given.union(*ends)
        return given

    def cannot_be_put_back(self, statements: list[ast.stmt]) -> bool:
        """Whether statements use something that would differ afterwards, or may wait forever.

        That is an iterator that computes, an open file, a queue or a socket, even in functions of the user's that they
        call.
        """
        used = {node.id for one in statements for node in ast.walk(one) if isinstance(node, ast.Name)}
        reached = list(_reachable(self.names[name] for name in used if name in self.names))
        # Where nothing has failed, what its functions report or write must not appear twice.
        tells = self._training and any(_tells(one.__code__) for one in reached if isinstance(one, FunctionType))
        return tells or any(map(_is_spent_by_use, reached))

    def _needs(self, node: ast.AST) -> None:
        """With ``node``, also take what made its tensors, if no graph shows what led to them."""
        if self._traced and self._has_graph(node):
            return
        for one in ast.walk(node):
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
                value = self.names.get(one.id)
                if type(value) is torch.Tensor and value.is_floating_point():
                    self._traced = False
                    self._graphs.add(one.id)

    def of(self, node: ast.stmt) -> ast.stmt | None:
        """The part of a statement to run; ``None`` for nothing."""
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)) and self._trains(node):
            return None
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(self._computes(target) for target in targets) or self._calls_module(node.value):
                if not self._traced:
                    self._needs(node)
                return node
            return None
        if isinstance(node, ast.Expr):
            return node if self._acts(node.value) else None
        if isinstance(node, (ast.If, *LOOPS, ast.With, ast.Try)):
            return self._compound(node)
        return None

    def _computes_under(self, item: ast.withitem) -> bool:
        """Whether a context is PyTorch's, or its name or code says that it may enter one."""
        if pytorchs_context(item.context_expr, self.names) is not None or isinstance(item.context_expr, ast.IfExp):
            return True
        called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else item.context_expr
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        code = getattr(getattr(self._value(called), "__wrapped__", None), "__code__", None)
        if isinstance(called, ast.Attribute) and isinstance(self._root(called.value), nn.Module):
            return True
        return any(part in name for part in ("autocast", "amp", "precision", "no_grad", "accumulate")) or (
            code is not None and not is_ours(code.co_filename) and "autocast" in code.co_names
        )

    def _trains(self, node: ast.stmt) -> bool:
        """Whether a statement calls a whole training: a function with a loop that runs backward."""
        called = [self._value(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
        codes = [one.__code__ for one in _reachable(called) if isinstance(one, FunctionType)]
        return any("backward" in code.co_names for code in codes) and any(map(_loops, codes))

    def _compound(self, node: Any) -> ast.stmt | None:
        fields = {}
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if block is not None:
                fields[name] = [taken for one in block if (taken := self.of(one)) is not None]
        if not any(fields.values()):
            return None
        fields["body"] = fields["body"] or [ast.copy_location(ast.Pass(), node)]
        values = {name: getattr(node, name, None) for name in node._fields}
        made: ast.stmt = type(node)(**{**values, **fields})
        return ast.copy_location(made, node)

    def _computes(self, target: ast.expr) -> bool:
        """Whether the target of an assignment is, or becomes part of, something with a graph."""
        if isinstance(target, (ast.Tuple, ast.List)):
            return any(map(self._computes, target.elts))
        if isinstance(target, ast.Starred):
            return self._computes(target.value)
        if isinstance(target, ast.Name):
            return target.id in self._graphs
        value = self._value(target)
        if value is not None:
            return _carries_graph(value) or (isinstance(target, ast.Subscript) and isinstance(value, torch.Tensor))
        return isinstance(target, ast.Subscript) and isinstance(self._value(target.value), torch.Tensor)

    def _calls_module(self, expression: ast.expr | None) -> bool:
        calls = (node for node in ast.walk(expression) if isinstance(node, ast.Call)) if expression is not None else ()
        return any(isinstance(self._value(call.func), nn.Module) for call in calls)

    def _acts(self, expression: ast.expr) -> bool:
        """Whether a call made for its effect acts on tensors.

        Either it is a method of a PyTorch object, or a function that is given tensors.
        """
        if not isinstance(expression, ast.Call):
            return False
        function = expression.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        receiver = self._root(function.value) if isinstance(function, ast.Attribute) else None
        if isinstance(receiver, torch.Tensor) or name == "backward" or _shares_memory(receiver):
            return True
        if any(part in name for part in _TELLING):
            return False
        if isinstance(function, ast.Attribute):
            if isinstance(receiver, (nn.Module, torch.optim.Optimizer, torch.amp.GradScaler, Thread)):
                return not any(part in name for part in _BUILDING)
            if isinstance(receiver, list) and name in ("append", "extend", "insert"):
                return any(self._has_graph(one) or self._calls_module(one) for one in expression.args)
            if _carries_graph(receiver) or _carries_graph(getattr(receiver, "__dict__", None)):
                return True
        called = self._value(function)
        code = getattr(_own(called), "__code__", None)
        given = any(map(self._has_tensor, (*expression.args, *(keyword.value for keyword in expression.keywords))))
        if code is None or is_library(code.co_filename):
            root = self._root(function.value) if isinstance(function, ast.Attribute) else None
            module = getattr(called, "__module__", None) or getattr(root, "__name__", "")
            return given and str(module).partition(".")[0] in ("torch", "numpy")
        if self._numbers and not any(self._has_numbers(one) for one in expression.args):
            # Given a model alone, it has changed that already.
            return "backward" in code.co_names
        return not _tells(code) and (given or _writes_to_what_it_reaches(called))

    def _has_numbers(self, expression: ast.expr) -> bool:
        values = (self._value(node) for node in ast.walk(expression) if isinstance(node, (ast.Name, ast.Attribute)))
        return any(next(tensors_in(value), None) is not None for value in values)

    def _root(self, expression: ast.expr) -> Any:
        """The value that a chain of attributes, calls and subscripts starts with, as far as it can be looked up."""
        while True:
            value = self._value(expression)
            if value is not None:
                return value
            if isinstance(expression, ast.Call):
                expression = expression.func
            elif isinstance(expression, (ast.Attribute, ast.Subscript)):
                expression = expression.value
            else:
                return None

    def _value(self, expression: ast.expr) -> Any:
        """What a name or its attribute holds; ``None`` for anything that would have to be computed."""
        if isinstance(expression, ast.Name):
            return self.names.get(expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self._value(expression.value)
            with contextlib.suppress(Exception):
                return None if owner is None else getattr(owner, expression.attr, None)
        if isinstance(expression, ast.Subscript) and isinstance(expression.slice, ast.Constant):
            owner = self._value(expression.value)
            key: Any = expression.slice.value
            with contextlib.suppress(Exception):
                return owner[key] if isinstance(owner, (list, tuple, dict)) else None
        return None

    def _has_graph(self, expression: ast.AST) -> bool:
        return any(isinstance(node, ast.Name) and node.id in self._graphs for node in ast.walk(expression))

    def _has_tensor(self, expression: ast.expr) -> bool:
        values = [self._value(node) for node in ast.walk(expression) if isinstance(node, (ast.Name, ast.Attribute))]
        computing = (nn.Module, torch.optim.Optimizer)
        return any(
            isinstance(value, computing) or _shares_memory(value) or next(tensors_in(value), None) is not None
            for value in values
        )


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store)


def _names_of(expression: ast.expr) -> Iterator[str]:
    """An expression, and what it takes attributes and items of."""
    while True:
        yield ast.unparse(expression)
        if isinstance(expression, ast.Call):
            expression = expression.func
        elif isinstance(expression, (ast.Attribute, ast.Subscript)):
            expression = expression.value
        else:
            return


def _reachable(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the values, and what functions and methods of the user's among them name, a few calls deep."""
    pending, seen = [(value, 0) for value in values], set[int]()
    while pending and len(seen) < 10_000:
        value, depth = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        function = _own(value)
        if function is not value:
            yield function
        if not isinstance(function, FunctionType) or depth > 4 or is_library(function.__code__.co_filename):
            continue
        cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        pending += [(one, depth + 1) for one in (*cells, *named) if one is not None]


def _tells(code: CodeType) -> bool:
    """Whether code reports or saves, by the names it uses."""
    return any(part in name for name in code.co_names for part in (*_TELLING, "open"))


def _writes_to_what_it_reaches(called: Any) -> bool:
    """Whether a function that is given no tensor writes to those of a module, or others, that it finds by itself."""
    reached = list(_reachable([called]))
    codes = [one.__code__ for one in reached if isinstance(one, FunctionType)]
    if any(map(_tells, codes)) or not any(_IN_PLACE.fullmatch(name) for code in codes for name in code.co_names):
        return False
    held = [*reached, *getattr(getattr(called, "__self__", None), "__dict__", {}).values()]
    return any(isinstance(one, nn.Module) or next(tensors_in(one), None) is not None for one in held)


def _own(called: Any) -> Any:
    """The function of a method, without decorators."""
    function = getattr(called, "__func__", called)
    return inspect.unwrap(function) if isinstance(function, FunctionType) else function


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_spent_by_use(value: Any) -> bool:
    if isinstance(value, (io.IOBase, socket.socket)) or type(value).__module__ in ("queue", "multiprocessing.queues"):
        return value not in (sys.stdout, sys.stderr)
    return isinstance(value, Iterator) and copied_iterator(value) is None


def _loops(code: CodeType) -> bool:
    return any(
        instruction.opname in ("FOR_ITER", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
        for instruction in dis.get_instructions(code)
    )


def _carries_graph(value: Any) -> bool:
    with contextlib.suppress(Exception):
        if isinstance(value, (dict, list, tuple)) and len(value) > 10_000:
            return False
        if _shares_memory(value):
            return True
        if any(tensor.grad_fn is not None or tensor.requires_grad for tensor in tensors_in(value)):
            return not isinstance(value, nn.Parameter)
        # A library's output that is a data class or a named tuple.
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, (nn.Module, type)) and len(attributes) < 100:
            return any(tensor.grad_fn is not None for tensor in tensors_in(list(attributes.values())))
    return False


def _shares_memory(value: Any) -> bool:
    """Whether a value is a NumPy array on the memory of a tensor."""
    while type(value).__module__ == "numpy" and getattr(value, "base", None) is not None:
        value = value.base
        if isinstance(value, torch.Tensor):
            return True
    return False


def _detached(name: str, value: Any) -> str | None:
    """The expression for a tensor, or for a flat list or tuple of tensors, without a graph; ``None`` if it has none."""
    if isinstance(value, torch.Tensor):
        return f"{name}.detach()" if value.grad_fn is not None else None
    if type(value) not in (list, tuple) or not value or not all(isinstance(one, torch.Tensor) for one in value):
        return None
    if all(one.grad_fn is None for one in value):
        return None
    each = f"one.detach() for one in {name}"
    return f"[{each}]" if isinstance(value, list) else f"tuple({each})"


def _last(node: ast.AST) -> ast.stmt | None:
    """The statement being run, as one that can run outside its function."""
    if isinstance(node, (ast.Return, ast.Expr)) and node.value is not None:
        value = node.value
        if any(isinstance(one, (ast.Await, ast.Yield, ast.YieldFrom)) for one in ast.walk(value)):
            return None
        return ast.copy_location(ast.Expr(value), node)
    if isinstance(node, (ast.If, ast.While)):
        return ast.copy_location(ast.Expr(node.test), node)
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Assert, ast.With, ast.Delete)):
        return node
    return None


def is_not_finite(value: Any) -> bool:
    """Whether a number, or a tensor among the value's, is not finite."""
    if isinstance(value, float):
        return not math.isfinite(value)
    with contextlib.suppress(Exception):
        return any(
            tensor.is_floating_point() and tensor.numel() <= _MOST_ELEMENTS and not bool(torch.isfinite(tensor).all())
            for tensor in tensors_in(value)
        )
    return False


def pytorchs_context(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    """Evaluate an expression that calls or names a PyTorch context; ``None`` for anything else, which may do more."""
    called = expression.func if isinstance(expression, ast.Call) else expression
    if not _is_path(called):
        return None
    with contextlib.suppress(Exception):
        value = eval(_compiled(called), dict(names))
        if _is_pytorchs(value) and not isinstance(value, nn.Module):
            made = eval(_compiled(expression), dict(names))
            return made if isinstance(made, AbstractContextManager) or hasattr(made, "__enter__") else None
    return None


def _is_pytorchs(value: Any) -> bool:
    """Whether a class or function, or else the class of an object, is defined in PyTorch."""
    named = isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType))
    module = getattr(value if named else type(value), "__module__", None)
    return str(module).partition(".")[0] == "torch"


def _is_path(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _compiled(expression: ast.expr) -> CodeType:
    code: CodeType = compile(ast.fix_missing_locations(ast.Expression(expression)), "<ampcheck>", "eval")
    return code
