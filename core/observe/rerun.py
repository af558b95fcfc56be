"""The statements of a running function that led to where it stands, to be run once more.

A plain loop hands nobody a function that computes the loss of a batch. Its source does: of the innermost loop around
the line that failed, or of the function where there is none, those statements are taken that compute with tensors, and
run with the variables as they stand. What by its name only tells or saves is left out, a whole training is not run
again, and statements that use what cannot be put back (a generator, a file, a queue) are not run at all.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import io
import itertools
import linecache
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from threading import Thread
from types import CellType, CodeType, FrameType, FunctionType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.observe.autograd import tensors_in
from ampcheck.observe.state import copied_iterator
from ampcheck.source.lines import is_library, is_ours, is_torch

# PyTorch's own files that call the user's training code, where all others are called by it.
_AROUND = ("/torch/utils/_contextlib.py", "/torch/amp/autocast_mode.py", "/torch/distributed/", "/torch/_dynamo/")
# Parts of the names of what tells or keeps, and does not compute.
_TELLING = ("log", "save", "print", "plot", "write", "visual", "display", "record", "report", "checkpoint", "dump")
# Parts of the names of methods that make a module what it is.
_BUILDING = ("add_module", "register_", "load_", "compile")
_BACKWARD = frozenset({"backward", "manual_backward", "scale", "step", "__call__"})
_CONTEXTS = ("decorate_autocast", "decorate_context")
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# The innermost loop, and the one around it: what was made there may be what failed.
_MOST_LOOPS = 2


class Standing(NamedTuple):
    """A frame and the instruction that it is at."""

    frame: FrameType
    line: int
    instruction: int


class Rerun:
    """A part of a program, to be called. ``roots`` are the objects that it begins with, for them to be put back."""

    def __init__(self, code: CodeType, names: dict[str, Any], contexts: Sequence[Any]) -> None:
        self._code = code
        self._names = names
        self._contexts = contexts
        self.roots: tuple[Any, ...] = tuple(names.values())

    def __call__(self) -> None:
        quiet = io.StringIO()
        names = {name: copied_iterator(value) or value for name, value in self._names.items()}
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
            exec(self._code, names)


def of_traceback(traceback: TracebackType | None) -> Iterator[Rerun]:
    """What led to an exception, with the least first: its statement with what that needs, then ever more around it."""
    standing: list[Standing] = []
    while traceback is not None:
        standing.append(Standing(traceback.tb_frame, traceback.tb_lineno, traceback.tb_lasti))
        traceback = traceback.tb_next
    outer = standing[0].frame.f_back if standing else None
    yield from _reruns([*_running(outer), *standing], left=len(standing))


def of_frame(frame: FrameType) -> Iterator[Rerun]:
    """The same of a frame that is running, with all that called it."""
    yield from _reruns(_running(frame), left=0)


def _running(frame: FrameType | None) -> list[Standing]:
    standing: list[Standing] = []
    while frame is not None:
        standing.append(Standing(frame, frame.f_lineno, frame.f_lasti))
        frame = frame.f_back
    return standing[::-1]


def _reruns(standing: list[Standing], left: int) -> Iterator[Rerun]:
    """``left``: the last so many frames were left by an exception, and with them what their ``with`` blocks did."""
    ours = (one for one in standing if not is_ours(one.frame.f_code.co_filename))
    outside = list(itertools.takewhile(lambda one: not _is_inside(one), ours))
    inward = [one.frame.f_code.co_name for one in itertools.takewhile(_is_foreign, reversed(outside))]
    if not _BACKWARD.issuperset(inward):
        # A library runs the loop: to run what called it is to train again.
        return
    users = outside[: len(outside) - len(inward)]
    first_left = len(standing) - left
    alive = {id(one.frame) for one in standing[:first_left]}
    contexts: list[Any] = []
    for index in range(len(users) - 1, -1, -1):
        one = users[index]
        if _is_foreign(one):
            context = _decorating(one.frame) if id(one.frame) not in alive else None
            if context is not None:
                contexts.insert(0, context)
                continue
            if is_torch(one.frame.f_code.co_filename) or one.frame.f_code.co_name == "__call__":
                continue
            return
        path = _path(one)
        if path is None:
            continue
        around = [context for outer in users[:index] if id(outer.frame) not in alive for context in _around(outer)]
        taken = _Taken({**one.frame.f_globals, **one.frame.f_locals}, training=not left)
        starts = [at for at, node in enumerate(path) if taken.begins(node)][-_MOST_LOOPS:]
        for start in reversed(starts):
            program = _program(one, path, start, taken, entered=id(one.frame) in alive)
            if program is not None:
                yield Rerun(program.code, program.names, [*around, *program.contexts, *contexts])
            if not isinstance(path[start], _LOOPS):
                break
        # Around a loop that was found lies the whole of it.
        if any(isinstance(node, _LOOPS) for node in path):
            return


def _is_inside(one: Standing) -> bool:
    file = one.frame.f_code.co_filename.replace("\\", "/")
    return is_torch(file) and not file.startswith("<") and not any(part in file for part in _AROUND)


def _is_foreign(one: Standing) -> bool:
    return is_library(one.frame.f_code.co_filename)


def _decorating(frame: FrameType) -> Any:
    """The context that a decorator of PyTorch (``@torch.autocast(...)``, ``@torch.no_grad()``) entered."""
    if frame.f_code.co_name not in _CONTEXTS or not is_torch(frame.f_code.co_filename):
        return None
    make = frame.f_locals.get("ctx_factory")
    return frame.f_locals.get("autocast_instance") or (make() if callable(make) else None)


class _Program(NamedTuple):
    code: CodeType
    names: dict[str, Any]
    contexts: list[Any]


def _program(one: Standing, path: list[ast.AST], start: int, taken: _Taken, *, entered: bool) -> _Program | None:
    """The statements of a frame, from ``path[start]``, that led to where it stands. ``entered``: its ``with`` blocks
    are still entered."""
    statements = taken.up_to(path, start)
    if statements is None or taken.cannot_be_put_back(statements):
        return None
    body = ast.fix_missing_locations(_Mangled(path).visit(ast.Module(statements, [])))
    try:
        code: CodeType = compile(body, one.frame.f_code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    own = one.frame.f_code
    facts: dict[str, Any] = {"co_name": own.co_name}
    if hasattr(own, "co_qualname"):
        facts["co_qualname"] = own.co_qualname
    contexts = [] if entered else list(_entered_around(path[:start], taken.names))
    return _Program(code.replace(**facts), dict(taken.names), contexts)


def _around(one: Standing) -> Iterator[Any]:
    """The contexts of PyTorch's that a frame, which an exception has left, was in."""
    path = _path(one)
    if path is not None:
        yield from _entered_around(path, {**one.frame.f_globals, **one.frame.f_locals})


def _entered_around(path: Sequence[ast.AST], names: Mapping[str, Any]) -> Iterator[Any]:
    for node in path:
        for item in node.items if isinstance(node, ast.With) else ():
            context = _pytorchs(item.context_expr, names)
            if context is not None:
                yield context


def _pytorchs(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an expression makes that calls a context of PyTorch's, or names one; ``None`` for all else, which may be
    more than a context."""
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
    module = getattr(value, "__module__", None) or type(value).__module__
    if type(value).__module__.partition(".")[0] not in ("builtins", "torch") and not isinstance(value, type):
        module = type(value).__module__
    return str(module).partition(".")[0] == "torch"


def _is_path(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _compiled(expression: ast.expr) -> CodeType:
    code: CodeType = compile(ast.fix_missing_locations(ast.Expression(expression)), "<ampcheck>", "eval")
    return code


def _path(one: Standing) -> list[ast.AST] | None:
    """The nodes of the source from the file down to the statement that a frame is at; ``None`` without the source."""
    code = one.frame.f_code
    lines = linecache.getlines(code.co_filename, one.frame.f_globals)
    if not lines or (code.co_name.startswith("<") and code.co_name != "<module>"):
        return None
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return None
    path: list[ast.AST] = [tree]
    if code.co_name != "<module>":
        function = next((found for found in _functions(tree, []) if _is_of(found[-1], code)), None)
        if function is None:
            return None
        path = function
    column = _column(one)
    while True:
        inner = [node for node in _statements(path[-1]) if node.lineno <= one.line <= (node.end_lineno or node.lineno)]
        if not inner:
            return path if isinstance(path[-1], ast.stmt) and not isinstance(path[-1], _FUNCTIONS) else None
        exact = [node for node in inner if column is None or _covers(node, one.line, column)]
        path = [*path, (exact or inner)[-1]]


def _functions(node: ast.AST, around: list[ast.AST]) -> Iterator[list[ast.AST]]:
    here = [*around, node]
    if isinstance(node, _FUNCTIONS):
        yield here
    for child in ast.iter_child_nodes(node):
        yield from _functions(child, here if isinstance(node, (ast.Module, ast.stmt)) else around)


def _is_of(node: ast.AST, code: CodeType) -> bool:
    if not isinstance(node, _FUNCTIONS) or node.name != code.co_name:
        return False
    first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
    return code.co_firstlineno in (node.lineno, first)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else ():
            if isinstance(item, ast.stmt):
                yield item
            elif isinstance(item, (ast.ExceptHandler, ast.match_case)):
                yield from item.body


def _column(one: Standing) -> int | None:
    """Where on its line the frame stands, in UTF-8 bytes, where Python tells (3.11 and later)."""
    if not hasattr(one.frame.f_code, "co_positions") or one.instruction < 0:
        return None
    position = next(itertools.islice(one.frame.f_code.co_positions(), one.instruction // 2, None), None)
    return position[2] if position is not None and position[0] == one.line else None


def _covers(node: ast.stmt, line: int, column: int) -> bool:
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return (node.lineno, node.col_offset) <= (line, column) < end


class _Taken:
    """Chooses the statements that compute with tensors, by what the variables hold."""

    def __init__(self, names: Mapping[str, Any], *, training: bool) -> None:
        self.names = names
        self._training = training
        self._graphs = {name for name, value in names.items() if _carries_graph(value)}
        self._traced = True

    def begins(self, node: ast.AST) -> bool:
        """Whether a step begins anew in a node: a loop, a function, or a block of something that is not PyTorch's."""
        if isinstance(node, ast.With):
            return not any(map(self._computes_under, node.items))
        return isinstance(node, (ast.Module, *_FUNCTIONS, *_LOOPS))

    def up_to(self, path: Sequence[ast.AST], start: int) -> list[ast.stmt] | None:
        """The statements in ``path[start]`` up to the last of the path, which is taken whatever it is. Branches on the
        way are taken, and ``with`` blocks entered."""
        statements: list[ast.stmt] | None = None
        for outer, inner in zip(reversed(path[start:-1]), reversed(path[start + 1 :]), strict=True):
            block = next((one for one in _blocks(outer) if any(node is inner for node in one)), None)
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
            before = [taken for node in reversed(block[:at]) if (taken := self.of(node)) is not None]
            statements = [*reversed(before), *statements]
        return statements

    def cannot_be_put_back(self, statements: list[ast.stmt]) -> bool:
        """Whether statements use what would be another afterwards, or may wait for ever: an iterator that computes, an
        open file, a queue, a socket; be it in functions of the user's own that they call."""
        used = {node.id for one in statements for node in ast.walk(one) if isinstance(node, ast.Name)}
        reached = list(_reachable(self.names[name] for name in used if name in self.names))
        if self._training:
            # Nothing has failed: what its own functions tell or write is not to be told or written twice.
            names = {name for one in reached if isinstance(one, FunctionType) for name in one.__code__.co_names}
            if any(part in name for name in names for part in (*_TELLING, "open")):
                return True
        return any(map(_is_spent_by_use, reached))

    def _needs(self, node: ast.AST) -> None:
        """A statement that is taken takes with it, where no graph shows what led to it, what made its tensors."""
        if self._traced and self._has_graph(node):
            return
        for one in ast.walk(node):
            if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
                value = self.names.get(one.id)
                if type(value) is torch.Tensor and value.is_floating_point():
                    self._traced = False
                    self._graphs.add(one.id)

    def of(self, node: ast.stmt) -> ast.stmt | None:
        """What is to be run of a statement; ``None``: nothing."""
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
        if isinstance(node, (ast.If, *_LOOPS, ast.With, ast.Try)):
            return self._compound(node)
        return None

    def _computes_under(self, item: ast.withitem) -> bool:
        """Whether a context is one of PyTorch's, or may enter one: it says so in its name or in its code."""
        if _pytorchs(item.context_expr, self.names) is not None or isinstance(item.context_expr, ast.IfExp):
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
        """Whether what is assigned is, or becomes part of, something with a graph."""
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
        """Whether a call for its effect acts on tensors: a method of something of PyTorch's, or a function given what
        has a graph."""
        if not isinstance(expression, ast.Call):
            return False
        function = expression.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        receiver = self._root(function.value) if isinstance(function, ast.Attribute) else None
        if isinstance(receiver, torch.Tensor):
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
        code = getattr(called, "__code__", None)
        if code is None or is_library(code.co_filename):
            of_torch = str(getattr(called, "__module__", "")).partition(".")[0] == "torch"
            return of_torch and any(map(self._has_tensor, expression.args))
        tells = any(part in used for used in code.co_names for part in (*_TELLING, "open"))
        return not tells and any(map(self._has_tensor, expression.args))

    def _root(self, expression: ast.expr) -> Any:
        """The value that a chain of attributes, calls and subscripts begins with, as far as it can be looked up."""
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
        """What names and attributes of them hold; ``None`` for all that would have to be computed."""
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
        return any(isinstance(value, computing) or next(tensors_in(value), None) is not None for value in values)


def _reachable(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and what functions and methods of the user's own among them name, a few calls deep."""
    pending, seen = [(value, 0) for value in values], set[int]()
    while pending and len(seen) < 10_000:
        value, depth = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        function = getattr(value, "__func__", value)
        if not isinstance(function, FunctionType) or depth > 4 or is_library(function.__code__.co_filename):
            continue
        cells = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        pending += [(one, depth + 1) for one in (*cells, *named) if one is not None]


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
        if any(tensor.grad_fn is not None or tensor.requires_grad for tensor in tensors_in(value)):
            return not isinstance(value, nn.Parameter)
        # An output as a data class, or named tuple of a library.
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, (nn.Module, type)) and len(attributes) < 100:
            return any(tensor.grad_fn is not None for tensor in tensors_in(list(attributes.values())))
    return False


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
            yield value
        for item in value if isinstance(value, list) else ():
            if isinstance(item, (ast.ExceptHandler, ast.match_case)):
                yield item.body


def _last(node: ast.AST) -> ast.stmt | None:
    """The statement that is being run, as one that can be run outside its function."""
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


class _Mangled(ast.NodeTransformer):
    """Private names as the class around them spells them."""

    def __init__(self, path: Iterable[ast.AST]) -> None:
        owners = [node.name.lstrip("_") for node in path if isinstance(node, ast.ClassDef)]
        self._owner = owners[-1] if owners else ""

    def _name(self, name: str) -> str:
        private = self._owner and name.startswith("__") and not name.endswith("__")
        return f"_{self._owner}{name}" if private else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(ast.Attribute(node.value, self._name(node.attr), node.ctx), node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Name(self._name(node.id), node.ctx), node)
