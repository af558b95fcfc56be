"""Faults, thrown into AmpCheck's own functions from outside: by a trace function, at the first line of the body.

Which functions there are is not written down here: a program is run once, and every function of AmpCheck that ran is
a point.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import io
import linecache
import os
import sys
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from loops import exports_left, random_state, traces_left

from ampcheck.source.lines import LISTENING, is_ours


class Fault(Exception):
    """What is injected."""


class Point(NamedTuple):
    """A function of AmpCheck."""

    file: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.file.removesuffix('.py')}-{self.name}"


def point_of(code: CodeType) -> Point:
    # `co_qualname` came with Python 3.11.
    name = getattr(code, "co_qualname", code.co_name).replace("<locals>.", "")
    return Point(_in_package(code.co_filename), name, code.co_firstlineno)


def _in_package(file: str) -> str:
    """``file`` as it is called in the package: ``observe/step.py``, ``integrations/timm.py``."""
    for package, folder in (("ampcheck", ""), ("ampcheck.integrations", "integrations/")):
        root = os.path.dirname(importlib.import_module(package).__file__ or "") + os.sep
        if file.startswith(root):
            return folder + file.removeprefix(root).replace(os.sep, "/")
    return file


class Tracer:
    """Records the functions of AmpCheck that run while it is armed or, given a point, raises ``error`` there, once."""

    def __init__(self, at: Point | None = None, error: type[BaseException] = Fault, *, call: int = 1) -> None:
        self.points: dict[Point, int] = {}
        self.fired = False
        self._at = at
        self._error = error
        self._call = call
        self._points: dict[CodeType, Point] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        outer = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(outer)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        # Comprehensions are functions of their own up to Python 3.11.
        if not is_ours(code.co_filename) or code.co_filename == LISTENING or code.co_name.startswith("<"):
            return None
        point = self._points.get(code)
        if point is None:
            point = self._points[code] = point_of(code)
        self.points[point] = self.points.get(point, 0) + 1
        return self._raise if point == self._at and self.points[point] == self._call and not self.fired else None

    def _raise(self, frame: FrameType, event: str, _: Any) -> Any:
        # What contains the fault begins after this word.
        if event != "line" or linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == "try:":
            return self._raise
        self.fired = True
        sys.settrace(None)
        frame.f_trace = None
        raise self._error("injected")


@dataclass
class Run:
    """What a program left."""

    result: Any = None
    error: BaseException | None = None
    frames: list[tuple[str, int | None, str]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    left: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    alive: int = 0
    random: tuple[Any, ...] = ()

    @property
    def faults(self) -> list[str]:
        """AmpCheck's warnings of itself."""
        said = [line for line in self.told if "switched itself off" in line]
        return said + [line for line in self.warned if "AmpCheck switched itself off" in line]


Program = Callable[[Callable[[], Any], list[str], list[Any]], Any]


def held(model: torch.nn.Module, *more: Any) -> dict[str, Any]:
    """What a run in a host leaves."""
    return {"model": copy.deepcopy(model.state_dict()), "more": copy.deepcopy(more)}


def _forget() -> None:
    """Empty AmpCheck's caches, so that all its functions run again."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ampcheck":
            for value in vars(module).values():
                getattr(value, "cache_clear", lambda: None)()


def run(program: Program, arm: Callable[[], Any] = contextlib.nullcontext) -> Run:
    """Run ``program(arm, told, models)`` from one random state; it adds its models to ``models``."""
    _forget()
    before = traces_left() | exports_left()
    torch.manual_seed(0)
    done = Run()
    models: list[Any] = []
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
        warnings.simplefilter("always")
        try:
            done.result = program(arm, done.told, models)
        except BaseException as error:  # noqa: BLE001 - it is looked at
            done.error = error
            done.frames = [
                (frame.filename, frame.lineno, frame.name)
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename.endswith(("programs.py", "loops.py"))
            ]
            done.notes = list(getattr(error, "__notes__", ()))
            # Held by the frames that it passed through.
            error.__traceback__ = error.__context__ = None
    done.random = random_state()
    done.told += said.getvalue().splitlines()
    done.warned = [str(warning.message) for warning in caught]
    references = [weakref.ref(model) for model in models]
    models.clear()
    # What is let go of by C++ in the first is found by the second.
    for _ in range(2):
        gc.collect()
    done.alive = sum(reference() is not None for reference in references)
    left = traces_left() | exports_left()
    done.left = {name: value for name, value in left.items() if value != before[name]}
    return done
