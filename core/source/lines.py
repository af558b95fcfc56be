"""Places in source code: whose frame is whose, and the line that a person would look at."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

from ampcheck.source.printable import shown
from ampcheck.trace import Role, Site

LISTENING = "<frozen importlib._bootstrap>"
"""The file that our frames between PyTorch's are said to be in: Python counts none of it up to the line that a warning
names (https://docs.python.org/3/library/warnings.html#warnings.warn)."""


@functools.cache
def _our_roots() -> tuple[str, ...]:
    roots = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    spec = importlib.util.find_spec("ampcheck.integrations")
    roots += (spec.submodule_search_locations or []) if spec else []
    return tuple(root + os.sep for root in roots)


@functools.cache
def _library_roots() -> tuple[str, ...]:
    paths = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    return tuple({root for path in paths if path for root in (path + os.sep, os.path.realpath(path) + os.sep)})


@functools.cache
def is_ours(file: str) -> bool:
    """Whether ``file`` belongs to AmpCheck itself, or stands for a call that it listens to."""
    return file == LISTENING or file.startswith(_our_roots())


@functools.cache
def is_torch(file: str) -> bool:
    """Whether ``file`` belongs to PyTorch, or is code that PyTorch or Python generated."""
    import torch

    generated = file.startswith(("<frozen", "<eval_with_key>", "<torch_package"))
    return generated or file.startswith(os.path.dirname(torch.__file__) + os.sep)


@functools.cache
def is_library(file: str) -> bool:
    """Whether ``file`` is installed code rather than the user's own."""
    parts = Path(file).parts
    installed = "site-packages" in parts or "dist-packages" in parts
    return installed or is_ours(file) or is_torch(file) or file.startswith(_library_roots())


def qualified_name(code: CodeType) -> str:
    """The name of a function as ``Class.method`` or ``outer.inner``."""
    # `co_qualname` came with Python 3.11.
    name: str = getattr(code, "co_qualname", code.co_name)
    return name.replace("<locals>.", "")


def site_of(code_file: str, line: int, function: str, role: Role = "call") -> Site:
    """The site of a line, with its source text where it can be read."""
    code = shown(linecache.getline(code_file, line).strip())
    return Site(shown(code_file), line, shown(function), code, role)


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """``frame`` and the frames that called it, innermost first, without AmpCheck's own."""
    while frame is not None:
        if not is_ours(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def calling_site(role: Role = "call", *, depth: int = 1) -> Site | None:
    """The innermost user frame of the running thread, else the innermost frame that is not PyTorch's."""
    outside_torch: FrameType | None = None
    for frame in callers(sys._getframe(depth)):
        file = frame.f_code.co_filename
        if not is_library(file):
            return _site_of_frame(frame, frame.f_lineno, role)
        if outside_torch is None and not is_torch(file):
            outside_torch = frame
    return _site_of_frame(outside_torch, outside_torch.f_lineno, role) if outside_torch else None


def region_site(*, depth: int = 1) -> Site | None:
    """The line that made the autocast region being entered: of a decorator, the decorator's, not the call's."""
    for frame in callers(sys._getframe(depth)):
        if frame.f_code.co_name == "decorate_autocast" and is_torch(frame.f_code.co_filename):
            return decorator_site(frame.f_locals.get("func")) or calling_site(depth=depth + 1)
        if not is_torch(frame.f_code.co_filename):
            break
    return calling_site(depth=depth + 1)


def decorator_site(function: object) -> Site | None:
    """The decorator of ``function`` that names autocast, else its first; ``None`` where it has none."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    if code is None or is_library(code.co_filename):
        return None
    # A decorated function's code begins with its first decorator, a lambda's with none.
    if not linecache.getline(code.co_filename, code.co_firstlineno).lstrip().startswith("@"):
        return None
    decorators: list[Site] = []
    for number in itertools.count(code.co_firstlineno):
        site = site_of(code.co_filename, number, qualified_name(code))
        if site.code.startswith("@"):
            decorators.append(site)
        if not linecache.getline(code.co_filename, number) or site.code.startswith(("def ", "async def ")):
            return next((one for one in decorators if "autocast" in one.code), next(iter(decorators), None))
    return None


def entered_by_user(*, depth: int = 1) -> bool:
    """Whether the frame that entered an autocast region is the user's: not PyTorch's checkpointing, nor a library's."""
    machinery = ("contextlib.py", "autocast_mode.py")
    frames = (frame.f_code.co_filename for frame in callers(sys._getframe(depth)))
    return not is_library(next((file for file in frames if os.path.basename(file) not in machinery), "<frozen"))


def raising_sites(traceback: TracebackType | None, role: Role = "raise") -> tuple[Site, ...]:
    """The frames an exception passed through: user frames innermost first, then library frames innermost first."""
    users: list[Site] = []
    libraries: list[Site] = []
    while traceback is not None:
        frame = traceback.tb_frame
        file = frame.f_code.co_filename
        if not is_ours(file):
            (libraries if is_library(file) else users).append(_site_of_frame(frame, traceback.tb_lineno, role))
        traceback = traceback.tb_next
    return (*reversed(users), *reversed(libraries))


def short_path(file: str) -> str:
    """``file`` relative to the working directory where that is shorter."""
    try:
        relative = os.path.relpath(file)
    except ValueError:
        return file
    return relative if len(relative) < len(file) else file


def names_of(code: CodeType) -> dict[str, Any]:
    """The names that tracebacks show for ``code``, as ``code.replace`` takes them."""
    # `co_qualname` came with Python 3.11.
    return {name: getattr(code, name) for name in ("co_name", "co_qualname") if hasattr(code, name)}


def remember_source(file: str, names: dict[str, object]) -> None:
    """Let the lines of a file that is none, such as a module in a ZIP archive, be read through its loader."""
    if file not in linecache.cache and not os.path.exists(file):
        linecache.lazycache(file, names)


def _site_of_frame(frame: FrameType, line: int, role: Role) -> Site:
    remember_source(frame.f_code.co_filename, frame.f_globals)
    return site_of(frame.f_code.co_filename, line, qualified_name(frame.f_code), role)
