"""Rebuild the statements that led to where a function stands, to run them again.

A plain loop offers no function that computes the loss of a batch, but its source does. Of the innermost loop around the
failing line, or of the function if there is none, this takes the statements that compute with tensors, and runs them
with the variables as they are. It leaves out what by its name only reports or saves, does not repeat a whole training,
and runs no statements that use something that cannot be put back (a generator, a file, a queue).

What a step takes over from the one before, such as the state of a recurrent network, brings a graph along that no such
rerun builds. Therefore the body of the loop is also run twice, from variables without a graph.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

from ampcheck.observe.carried import without_graphs
from ampcheck.observe.state import copied_iterator
from ampcheck.observe.statements import Statements, is_not_finite, pytorchs_context
from ampcheck.source.lines import is_library, is_ours, is_torch, names_of, qualified_name, site_of
from ampcheck.source.syntax import FUNCTIONS, LOOPS, blocks, covers, tree_of
from ampcheck.trace import Carried

# The files of PyTorch that call the user's training code; the user's code calls all others.
_AROUND = (
    "/torch/utils/_contextlib.py",
    "/torch/amp/autocast_mode.py",
    "/torch/distributed/",
    "/torch/multiprocessing/",
    "/torch/_dynamo/",
)
_BACKWARD = frozenset({"backward", "manual_backward", "scale", "step", "__call__"})
# The variables of PyTorch's decorators that hold the context.
_CONTEXTS = frozenset({"ctx_factory", "autocast_instance"})


# The innermost loop and the one around it, which may have made what failed.
_MOST_LOOPS = 2


class Standing(NamedTuple):
    """A frame and the instruction it is at."""

    frame: FrameType
    line: int
    instruction: int


class Rerun:
    """A part of a program that can be called. ``roots`` are the objects it starts from, to be put back. ``carried``,
    if not ``None``: its step takes over a graph from the one before, which it therefore runs, too."""

    def __init__(
        self,
        code: CodeType,
        names: dict[str, Any],
        contexts: Sequence[Any],
        carried: tuple[Carried, ...] | None = None,
    ) -> None:
        self._code = code
        self._names = names
        self._contexts = contexts
        self.carried = carried
        self.roots: tuple[Any, ...] = tuple(names.values())

    def __call__(self) -> None:
        quiet = io.StringIO()
        names = {name: copied_iterator(value) or value for name, value in self._names.items()}
        if self.carried is not None:
            names = without_graphs(names)
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context)
            stack.enter_context(contextlib.redirect_stdout(quiet))
            stack.enter_context(contextlib.redirect_stderr(quiet))
            exec(self._code, names)


def of_traceback(traceback: TracebackType | None, *, numbers: bool = False) -> Iterator[Rerun]:
    """Yield reruns of what led to an exception: its statement and what that needs, then ever more around it.

    ``numbers``: that includes what computed values that are not finite.
    """
    standing: list[Standing] = []
    while traceback is not None:
        standing.append(Standing(traceback.tb_frame, traceback.tb_lineno, traceback.tb_lasti))
        traceback = traceback.tb_next
    outer = standing[0].frame.f_back if standing else None
    yield from _reruns([*_running(outer), *standing], left=len(standing), numbers=numbers)


def of_frame(frame: FrameType, *, numbers: bool = False) -> Iterator[Rerun]:
    """Yield reruns of what led to where a running frame stands, with all that called it.

    ``numbers``: values are not finite there; otherwise the step is only suspected of a fault.
    """
    yield from _reruns(_running(frame), left=0, numbers=numbers)


def leaves_not_finite(traceback: TracebackType | None) -> bool:
    """Whether the innermost of the user's functions that an exception left holds a number that is not finite."""
    inner: FrameType | None = None
    while traceback is not None:
        frame = traceback.tb_frame
        inner = inner if is_library(frame.f_code.co_filename) else frame
        traceback = traceback.tb_next
    numbers = inner.f_locals.values() if inner is not None else ()
    return any(is_not_finite(one) for one in numbers if isinstance(one, float) or getattr(one, "ndim", None) == 0)


def _running(frame: FrameType | None) -> list[Standing]:
    standing: list[Standing] = []
    while frame is not None:
        standing.append(Standing(frame, frame.f_lineno, frame.f_lasti))
        frame = frame.f_back
    return standing[::-1]


def _reruns(standing: list[Standing], left: int, *, numbers: bool) -> Iterator[Rerun]:
    """Yield reruns, smallest first. An exception left the last ``left`` frames, and with them their ``with`` blocks."""
    ours = (one for one in standing if not is_ours(one.frame.f_code.co_filename))
    outside = list(itertools.takewhile(lambda one: not _is_inside(one), ours))
    inward = [one.frame.f_code.co_name for one in itertools.takewhile(_is_foreign, reversed(outside))]
    if not _BACKWARD.issuperset(inward):
        # A library runs the loop: rerunning its caller would train again.
        return
    users = outside[: len(outside) - len(inward)]
    first_left = len(standing) - left
    alive = {id(one.frame) for one in standing[:first_left]}
    carried: list[Carried] = []
    for index in range(len(users) - 1, -1, -1):
        one = users[index]
        if _is_foreign(one):
            if is_torch(one.frame.f_code.co_filename) or one.frame.f_code.co_name == "__call__":
                continue
            return
        path = _path(one)
        if path is None:
            continue
        around = [context for outer in users[:index] if id(outer.frame) not in alive for context in _around(outer)]
        names = {**one.frame.f_globals, **one.frame.f_locals}
        taken = Statements(names, training=not left and not numbers, numbers=numbers)
        starts = [at for at, node in enumerate(path) if taken.begins(node)][-_MOST_LOOPS:]
        carried += _carried(one, path, starts[-1]) if left and starts else ()
        for start in reversed(starts):
            loop = isinstance(path[start], LOOPS)
            # Where nothing failed, what came before does not matter.
            for twice in (False, True) if loop and left and start == starts[-1] else (False,):
                program = _program(one, path, start, taken, entered=id(one.frame) in alive, twice=twice)
                if program is not None:
                    both = tuple(carried) if twice else None
                    yield Rerun(program.code, program.names, [*around, *program.contexts], both)
            if not loop:
                break
        # Statements further out would run the whole loop.
        if any(isinstance(node, LOOPS) for node in path):
            return


def _is_inside(one: Standing) -> bool:
    file = one.frame.f_code.co_filename.replace("\\", "/")
    return is_torch(file) and not file.startswith("<") and not any(part in file for part in _AROUND)


def _is_foreign(one: Standing) -> bool:
    return is_library(one.frame.f_code.co_filename)


def _decorating(frame: FrameType) -> Any:
    """The context that a PyTorch decorator (``@torch.autocast(...)``, ``@torch.no_grad()``) entered in this frame."""
    if not is_torch(frame.f_code.co_filename) or not _CONTEXTS.intersection(frame.f_locals):
        return None
    make = frame.f_locals.get("ctx_factory")
    return frame.f_locals.get("autocast_instance") or (make() if callable(make) else None)


class _Program(NamedTuple):
    code: CodeType
    names: dict[str, Any]
    contexts: list[Any]


def _program(
    one: Standing, path: list[ast.AST], start: int, taken: Statements, *, entered: bool, twice: bool
) -> _Program | None:
    """The statements of a frame, from ``path[start]``, that led to where it stands.

    ``entered``: its ``with`` blocks are still active. ``twice``: first runs all statements of ``path[start]``.
    """
    statements = taken.up_to(path, start)
    if statements is not None and twice:
        statements = [*(taken.up_to(path, start, beyond=True) or ()), *statements]
    if statements is None or taken.cannot_be_put_back(statements):
        return None
    body = ast.fix_missing_locations(_Mangled(path).visit(ast.Module(statements, [])))
    try:
        code: CodeType = compile(body, one.frame.f_code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    contexts = [] if entered else list(_entered_around(path[:start], taken.names))
    return _Program(code.replace(**names_of(one.frame.f_code)), dict(taken.names), contexts)


def _carried(one: Standing, path: list[ast.AST], start: int) -> Iterator[Carried]:
    """Yield the variables of a frame by which a step may take over a graph from the one before."""
    stands = path[-1]
    taken = Statements({**one.frame.f_globals, **one.frame.f_locals}, training=False)
    statements = taken.up_to(path, start)
    if statements is None or not isinstance(stands, (ast.Expr, ast.Assign, ast.AugAssign)):
        return
    if stands.lineno == stands.end_lineno:
        site = site_of(one.frame.f_code.co_filename, stands.lineno, qualified_name(one.frame.f_code))
        yield from (Carried(detached, site) for detached in taken.carried(statements))


def _around(one: Standing) -> Iterator[Any]:
    """Yield the PyTorch contexts that a frame was in when an exception left it."""
    decorating = _decorating(one.frame)
    if decorating is not None:
        yield decorating
    if _is_foreign(one):
        return
    path = _path(one)
    if path is not None:
        yield from _entered_around(path, {**one.frame.f_globals, **one.frame.f_locals})


def _entered_around(path: Sequence[ast.AST], names: Mapping[str, Any]) -> Iterator[Any]:
    for node in path:
        for item in node.items if isinstance(node, ast.With) else ():
            context = pytorchs_context(item.context_expr, names)
            if context is not None:
                yield context


def _path(one: Standing) -> list[ast.AST] | None:
    """The source nodes from the file down to the statement a frame is at; ``None`` without the source."""
    code = one.frame.f_code
    tree = tree_of(code.co_filename, one.frame.f_globals)
    if tree is None or (code.co_name.startswith("<") and code.co_name != "<module>"):
        return None
    path: list[ast.AST] = [tree]
    if code.co_name != "<module>":
        function = next((found for found in _functions(tree, []) if _is_of(found[-1], code)), None)
        if function is None:
            return None
        path = function
    column = _column(one)
    while True:
        inner = [node for block in blocks(path[-1]) for node in block if covers(node, one.line)]
        if not inner:
            return path if isinstance(path[-1], ast.stmt) and not isinstance(path[-1], FUNCTIONS) else None
        exact = [node for node in inner if column is None or _covers(node, one.line, column)]
        path = [*path, (exact or inner)[-1]]


def _functions(node: ast.AST, around: list[ast.AST]) -> Iterator[list[ast.AST]]:
    here = [*around, node]
    if isinstance(node, FUNCTIONS):
        yield here
    for child in ast.iter_child_nodes(node):
        yield from _functions(child, here if isinstance(node, (ast.Module, ast.stmt)) else around)


def _is_of(node: ast.AST, code: CodeType) -> bool:
    if not isinstance(node, FUNCTIONS) or node.name != code.co_name:
        return False
    first = min((decorator.lineno for decorator in node.decorator_list), default=node.lineno)
    return code.co_firstlineno in (node.lineno, first)


def _column(one: Standing) -> int | None:
    """The column a frame is at, in UTF-8 bytes, if Python knows it (3.11 and later)."""
    if not hasattr(one.frame.f_code, "co_positions") or one.instruction < 0:
        return None
    position = next(itertools.islice(one.frame.f_code.co_positions(), one.instruction // 2, None), None)
    return position[2] if position is not None and position[0] == one.line else None


def _covers(node: ast.stmt, line: int, column: int) -> bool:
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return (node.lineno, node.col_offset) <= (line, column) < end


class _Mangled(ast.NodeTransformer):
    """Spells private names as the class around them does."""

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
