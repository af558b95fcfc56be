"""Listen to PyTorch functions without the program noticing.

A function that is listened to stays the same object, under every name it was imported as: only its code is swapped
meanwhile. The new code keeps the original's name, file and line, so that tracebacks, profiles and warnings look as
usual. While Dynamo compiles, the original code is back: what it compiles must not depend on who listens.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from ampcheck.observe.probes.containment import hide_frame, undo
from ampcheck.source.lines import LISTENING, names_of

Before = Callable[..., tuple[Any, ...] | None]
After = Callable[..., None]


class Listening:
    """A listener and what it listens to.

    ``end`` ends all of it, even what a fault left half-way, and may be called again.
    """

    def to(
        self, function: Any, *, before: Before | None = None, after: After | None = None, failed: After | None = None
    ) -> None:
        """Call the given functions around each call of the Python function ``function``.

        ``before(*args, **kwargs)`` runs before it and ``after(result, *args, **kwargs)`` after it, or ``failed(error,
        *args, **kwargs)`` if it raised; none of them may raise. What ``before`` returns, if anything, replaces the
        positional arguments.
        """
        self.by(function, functools.partial(_between, function), before, after, failed)

    def by(self, function: Any, made: Callable[[CodeType, list[Any]], CodeType], *listener: Any) -> None:
        """Listen by swapping in the code ``made(its own code, listeners)``, which all listeners share."""
        _mind_forks()
        heard = _functions.setdefault(function, _Function(function, made))
        heard.listeners.append((self, *listener))
        heard.renew()
        _mind_dynamo()

    def to_attribute(self, owner: Any, name: str, made: Callable[[Any, list[Any]], Any], listener: Any) -> None:
        """Listen to an attribute of ``owner`` that is written in C, and so has no code to swap.

        Meanwhile the attribute is ``made(original, listeners)``. If somebody else replaces it too, theirs stays.
        """
        stand_in = _attributes.setdefault((id(owner), name), _StandIn(owner, name, made))
        stand_in.listeners.append((self, listener))
        stand_in.renew()

    def end(self) -> None:
        everything: list[_Function | _StandIn] = [*_functions.values(), *_attributes.values()]
        for held in everything:
            if any(one[0] is self for one in held.listeners):
                held.listeners[:] = [one for one in held.listeners if one[0] is not self]
                held.renew()
        _mind_dynamo()


class _Function:
    """A function that can be listened to: its own code, and how to make the code that calls the listeners."""

    def __init__(self, function: FunctionType, made: Callable[[CodeType, list[Any]], CodeType]) -> None:
        self.listeners: list[Any] = []
        self._function = function
        self._made = made
        self._own: CodeType | None = None
        self._heard: CodeType | None = None

    def renew(self) -> None:
        if self.listeners:
            self._own = self._own or self._function.__code__
            self._heard = self._made(self._own, self.listeners)
        else:
            self._heard = None
        self.swap()

    def swap(self) -> None:
        if self._own is not None:
            self._function.__code__ = self._own if _compiling or self._heard is None else self._heard
        if self._heard is None:
            self._own = None


class _StandIn:
    """An attribute that can be listened to, and what stands in for it meanwhile."""

    def __init__(self, owner: Any, name: str, made: Callable[[Any, list[Any]], Any]) -> None:
        self.listeners: list[Any] = []
        self._owner, self._name, self._made = owner, name, made
        self._before: Any = _ABSENT
        self._value: Any = _ABSENT

    def renew(self) -> None:
        owner, name = self._owner, self._name
        if self.listeners and self._value is _ABSENT:
            self._before, value = vars(owner).get(name, _ABSENT), self._made(getattr(owner, name), self.listeners)
            self._value = value
            setattr(owner, name, value)
        elif not self.listeners and self._value is not _ABSENT:
            if vars(owner).get(name) is self._value:
                if self._before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, self._before)
            self._value = _ABSENT


_functions: dict[FunctionType, _Function] = {}
_attributes: dict[tuple[int, str], _StandIn] = {}
_compiling: list[Any] = []
_ABSENT = object()


live: list[list[Any]] = []
"""Lists of listeners that running code reads when it gets to them."""


@contextlib.contextmanager
def nobody_listening() -> Iterator[None]:
    """Set all listeners aside, except those that start inside the block."""
    held: list[_Function | _StandIn] = [*_functions.values(), *_attributes.values()]
    lists = [*live, *(one.listeners for one in held)]
    kept = [one[:] for one in lists]

    def renew(contents: Iterable[list[Any]]) -> None:
        for one, content in zip(lists, contents, strict=True):
            one[:] = content
        for listened in held:
            listened.renew()

    try:
        renew([] for _ in lists)
        yield
    finally:
        undo(renew, kept)


def disguised(template: Any, original: CodeType, values: dict[str, Any], line: int | None = None) -> CodeType:
    """The code of ``template`` in the guise of ``original``, all of it on ``line`` (by default its first).

    ``values`` replace the strings that name them.
    """
    made = template.__code__
    line = original.co_firstlineno if line is None else line
    facts: dict[str, Any] = {
        "co_consts": tuple(values.get(one, one) if isinstance(one, str) else one for one in made.co_consts),
        "co_filename": original.co_filename,
        **names_of(original),
        "co_firstlineno": original.co_firstlineno,
        # The template uses none, but a function's closure must fit its code.
        "co_freevars": original.co_freevars,
        "co_linetable": _on_one_line(len(made.co_code), line - original.co_firstlineno, _columns(original, line)),
    }
    code: CodeType = made.replace(**facts)
    return code


@functools.cache
def _columns(code: CodeType, line: int) -> tuple[int, int] | None:
    """The columns of the widest expression on a line of ``code``."""
    if not hasattr(code, "co_positions"):
        return None
    spans = [
        (left, right)
        for first, last, left, right in code.co_positions()
        if first == last == line and left is not None and right is not None
    ]
    return max(spans, key=lambda span: span[1] - span[0], default=None)


@functools.cache
def _on_one_line(size: int, delta: int, columns: tuple[int, int] | None) -> bytes:
    """A line table that puts all ``size`` bytes of code on the line ``delta`` after the first.

    See https://github.com/python/cpython/blob/main/InternalDocs/code_objects.md
    """
    table = bytearray()
    deltas = itertools.chain((delta,), itertools.repeat(0))
    if sys.version_info < (3, 11):
        for start in range(0, size, 254):
            table += bytes((min(254, size - start), next(deltas)))
        return bytes(table)
    units = size // 2
    for start in range(0, units, 8):
        kind = 13 if columns is None else 14
        table.append(0x80 | kind << 3 | min(8, units - start) - 1)
        table += _number(next(deltas) << 1)
        if columns is not None:
            table += _number(0) + _number(columns[0] + 1) + _number(columns[1] + 1)
    return bytes(table)


def _number(value: int) -> bytes:
    encoded = bytearray()
    while value >= 64:
        encoded.append(0x40 | value & 63)
        value >>= 6
    encoded.append(value)
    return bytes(encoded)


def _between(function: FunctionType, code: CodeType, listeners: list[Any]) -> CodeType:
    original = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    original.__kwdefaults__, original.__qualname__ = function.__kwdefaults__, function.__qualname__
    _, *kinds = zip(*listeners, strict=True)
    befores, afters, faileds = (tuple(one for one in kind if one is not None) for kind in kinds)
    values = {"befores": befores, "original": original, "afters": afters, "faileds": faileds, "hide_frame": hide_frame}
    made: CodeType = disguised(_template, code, values).replace(co_filename=LISTENING)
    return made


# `disguised` replaces these strings by their values: the code runs with the globals of another module.
def _template(*args: Any, **kwargs: Any) -> Any:
    befores: Any = "befores"
    original: Any = "original"
    afters: Any = "afters"
    faileds: Any = "faileds"
    hide_frame: Any = "hide_frame"
    for before in befores:
        args = before(*args, **kwargs) or args
    try:
        result = original(*args, **kwargs)
    except BaseException as error:
        for failed in faileds:
            failed(error, *args, **kwargs)
        hide_frame(error)
        raise
    for after in afters:
        after(result, *args, **kwargs)
    return result


@functools.cache
def _mind_forks() -> None:
    """Stop listening in forked processes: they are other programs."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    held: list[_Function | _StandIn] = [*_functions.values(), *_attributes.values()]
    for one in (*live, *(each.listeners for each in held)):
        one.clear()
    for each in held:
        each.renew()


def _mind_dynamo() -> None:
    """Have Dynamo say when it compiles, as long as anybody listens."""
    anybody = any(function.listeners for function in _functions.values())
    if not anybody:
        _compiling.clear()
    dynamo = sys.modules.get("torch._dynamo")
    handler = getattr(dynamo, "callback_handler", None)
    if handler is None:
        return
    minded = _compilation_began in handler.start_callbacks
    if anybody and not minded:
        handler.register_start_callback(_compilation_began)
        handler.register_end_callback(_compilation_ended)
    elif not anybody and minded:
        with contextlib.suppress(ValueError):
            handler.remove_start_callback(_compilation_began)
            handler.remove_end_callback(_compilation_ended)


# Dynamo takes what these raise for its own fault.
def _compilation_began(*_: Any) -> None:
    try:
        _compiling.append(None)
        _swap_all()
    except Exception:  # noqa: BLE001
        _compiling.clear()


def _compilation_ended(*_: Any) -> None:
    try:
        _compiling.clear()
        _swap_all()
    except Exception:  # noqa: BLE001
        _compiling.clear()


def _swap_all() -> None:
    for function in _functions.values():
        function.swap()
