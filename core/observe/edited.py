"""A program as it would run with one line of its source edited."""

from __future__ import annotations

import ast
import gc
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from traceback import walk_stack
from types import CodeType, FunctionType, TracebackType
from typing import Any, TypeGuard

from ampcheck.source.lines import is_library
from ampcheck.source.syntax import FUNCTIONS, LOOPS, covers, tree_of


class CannotEdit(Exception):
    """The edit cannot be tried: its line is not here, or belongs to an installed package, or to code that cannot be
    exchanged."""


class Edited:
    """Runs functions defined around a line as if it read ``after`` instead of ``before``; source that is read meanwhile
    reads so too. Entering it raises ``CannotEdit`` and changes nothing then."""

    def __init__(self, file: str, line: int, before: str, after: str) -> None:
        self._file, self._line, self._before, self._after = file, line, before, after
        self._exchanged: list[tuple[FunctionType, CodeType]] = []
        self._cached: list[Any] = []

    def __enter__(self) -> None:
        file, line = self._file, self._line
        lines = linecache.getlines(file)
        stands = lines[line - 1] if line <= len(lines) else ""
        if is_library(file) or not self._before or stands.strip() != self._before:
            raise CannotEdit(self._before)
        if _others_run_the_program():
            # They would run the edited code too.
            raise CannotEdit("other threads run the program's code")
        indent = stands[: len(stands) - len(stands.lstrip())]
        edited = f"{indent}{self._after.replace(chr(10), '; ')}\n"
        changed = [*lines[: line - 1], edited, *lines[line:]]
        try:
            code = compile("".join(changed), file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise CannotEdit(self._after) from error
        codes = list(_codes_in(code))
        times = Counter(map(_key, codes))
        made = {_key(one): one for one in codes if times[_key(one)] == 1}
        functions = _functions_around(file, line)
        if any(_key(one.__code__) not in made for one in functions):
            raise CannotEdit("two functions begin on the line")
        if not functions and _functions_of(file, line):
            raise CannotEdit("the function was not found")
        self._cached = [linecache.cache[file]] if file in linecache.cache else []
        try:
            # Without a modification time, linecache does not compare it with the file.
            linecache.cache[file] = (0, None, changed, file)
            for function in functions:
                new = made[_key(function.__code__)]
                if new.co_freevars == function.__code__.co_freevars:
                    self._exchanged.append((function, function.__code__))
                    function.__code__ = new
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._exchanged:
            function, own = self._exchanged[-1]
            function.__code__ = own
            self._exchanged.pop()
        if self._cached:
            linecache.cache[self._file] = self._cached[0]
        else:
            linecache.cache.pop(self._file, None)


def keeps_effect(file: str, line: int, after: str) -> bool:
    """Whether what a line writes is still seen if the line reads ``after``, which gives a name another tensor instead:
    whether the name is read again, in the function or in a loop around the line. True where the source does not tell.
    """
    tree = tree_of(file)
    try:
        (first, *_) = ast.parse(after.strip()).body
    except (SyntaxError, ValueError):
        return True
    targets = first.targets if isinstance(first, ast.Assign) else []
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    if not names or tree is None:
        return True
    scope = next(reversed(_functions_of(file, line)), tree)
    loops = [node for node in ast.walk(scope) if isinstance(node, LOOPS) and covers(node, line)]
    read = [node for node in ast.walk(scope) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    for name in names:
        lines = [node.lineno for node in read if node.id == name]
        rebinding = [loop for loop in loops if _is_for(loop) and name in _names_in(loop.target)]
        end = (rebinding[-1].end_lineno or line) if rebinding else sys.maxsize
        carried = not rebinding and any(one != line and covers(loop, one) for loop in loops for one in lines)
        if carried or any(line < one <= end for one in lines):
            return True
    return False


def _names_in(node: ast.AST) -> set[str]:
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}


def _is_for(node: ast.AST | None) -> TypeGuard[ast.For | ast.AsyncFor]:
    return isinstance(node, (ast.For, ast.AsyncFor))


def _functions_of(file: str, line: int) -> list[ast.AST]:
    """The functions that a line is in, the innermost last."""
    tree = tree_of(file)
    nodes = ast.walk(tree) if tree is not None else ()
    return [node for node in nodes if isinstance(node, (*FUNCTIONS, ast.Lambda)) and covers(node, line)]


def _others_run_the_program() -> bool:
    own = threading.get_ident()
    others = (frame for thread, frame in sys._current_frames().items() if thread != own)
    return any(not is_library(frame.f_code.co_filename) for other in others for frame, _ in walk_stack(other))


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _functions_around(file: str, line: int) -> list[FunctionType]:
    """The functions that a line is in: of a module's own functions and methods or, if it is in none of these, of all
    that are alive, which takes longer."""
    defined = _functions_of(file, line)
    modules = [one for one in tuple(sys.modules.values()) if getattr(one, "__file__", None) == file]
    owners: list[Mapping[str, Any]] = [vars(module) for module in modules]
    owners += [vars(kind) for owner in owners for kind in tuple(owner.values()) if isinstance(kind, type)]
    own = [getattr(one, "__func__", one) for owner in owners for one in tuple(owner.values())]
    found = {id(one): one for one in own if _is_around(one, file, line)}
    if len(defined) == len(found) == 1 and not hasattr(next(iter(found.values())), "__wrapped__"):
        return list(found.values())
    return [one for one in gc.get_objects() if _is_around(one, file, line)]


def _is_around(one: object, file: str, line: int) -> TypeGuard[FunctionType]:
    if type(one) is not FunctionType or one.__code__.co_filename != file:
        return False
    return one.__code__.co_firstlineno <= line <= max((n for *_, n in one.__code__.co_lines() if n), default=0)
