"""A program as it would run with one line of its source edited."""

from __future__ import annotations

import contextlib
import gc
import linecache
from collections.abc import Iterator
from types import CodeType, FunctionType

from ampcheck.source.lines import is_library


class CannotEdit(Exception):
    """The line cannot be edited: its source is not here, is an installed package's, or is no statement of its own."""


@contextlib.contextmanager
def edited(file: str, line: int, before: str, after: str) -> Iterator[None]:
    """Run the functions that are defined around a line as if it read ``after`` in place of ``before``. Source that is
    read meanwhile reads so too. Raises ``CannotEdit`` ahead of the block."""
    if is_library(file):
        raise CannotEdit(file)
    lines = linecache.getlines(file)
    stands = lines[line - 1] if line <= len(lines) else ""
    if not before or stands.strip() != before:
        raise CannotEdit(before)
    indent = stands[: len(stands) - len(stands.lstrip())]
    changed = [*lines[: line - 1], f"{indent}{after.replace(chr(10), '; ')}\n", *lines[line:]]
    try:
        code = compile("".join(changed), file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise CannotEdit(after) from error
    made = {(one.co_name, one.co_firstlineno): one for one in _codes_in(code)}
    exchanged: list[tuple[FunctionType, CodeType]] = []
    kept = linecache.cache.get(file)
    try:
        # Without a time it is not held against the file.
        linecache.cache[file] = (0, None, changed, file)
        for function in _functions_around(file, line):
            new = made.get((function.__code__.co_name, function.__code__.co_firstlineno))
            if new is not None and new.co_freevars == function.__code__.co_freevars:
                exchanged.append((function, function.__code__))
                function.__code__ = new
        yield
    finally:
        for function, own in exchanged:
            function.__code__ = own
        if kept is not None:
            linecache.cache[file] = kept
        else:
            linecache.cache.pop(file, None)


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _functions_around(file: str, line: int) -> list[FunctionType]:
    return [
        one
        for one in gc.get_objects()
        if type(one) is FunctionType
        and one.__code__.co_filename == file
        and one.__code__.co_firstlineno <= line <= max((n for *_, n in one.__code__.co_lines() if n), default=0)
    ]
