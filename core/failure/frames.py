"""The frames that an exception passed through: whose code they run, in which phase and which module."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from traceback import walk_tb
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from ampcheck.source.lines import is_library, is_ours, is_torch, qualified_name, remember_source, site_of
from ampcheck.trace import Role, Site

Span = tuple[int, int, int, int]

_SCALER = "amp/grad_scaler.py"

# Dynamo appends this to an error raised while it traced user code, whose frames are not in the traceback.
_USER_CODE = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)', re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a traceback, or one that Dynamo quotes (then without variables).

    ``span`` is the expression that was being evaluated: line, end line, column and end column (UTF-8 bytes), if Python
    tells (3.11 and later). A frame lives only while a failure is examined.
    """

    file: str
    line: int
    function: str
    names: Mapping[str, Any] = field(default_factory=dict)
    globals: Mapping[str, Any] = field(default_factory=dict)
    span: Span | None = None
    receiver: Any = None

    @property
    def library(self) -> bool:
        return is_library(self.file)

    @property
    def module(self) -> nn.Module | None:
        return self.receiver if isinstance(self.receiver, nn.Module) else None

    def in_torch(self, path: str) -> bool:
        """Whether this is PyTorch's own file ``path`` (``"amp/grad_scaler.py"``)."""
        return is_torch(self.file) and self.file.replace("\\", "/").endswith(f"/torch/{path}")

    def site(self, role: Role = "raise") -> Site:
        return site_of(self.file, self.line, self.function, role)


class Scene(NamedTuple):
    """The source of a failure's facts: the exception that matters, what its message says (the groups of the signature
    that it matches), its frames, and the model or the outermost module in the frames."""

    exc: BaseException
    said: Mapping[str, str | None]
    found: tuple[Frame, ...]
    root: nn.Module | None


def chain(exc: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """``exc`` and the exceptions that led to it, outermost first; the flag is false for a link by *during handling*."""
    seen: set[int] = set()
    current: BaseException | None = exc
    explicit = True
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current, explicit
        rewrapped = _rewrapped(current)
        explicit = current.__cause__ is not None or rewrapped
        hidden = current.__suppress_context__ and not rewrapped
        current = current.__cause__ or (None if hidden else current.__context__)


def _rewrapped(exc: BaseException) -> bool:
    """Whether the text of ``exc`` contains that of its context. Dynamo wraps exceptions without ``from``, and a
    framework may raise one again in its own words as the same type, ``from None``."""
    inner = exc.__context__
    if inner is None or not str(inner).strip():
        return False
    known = type(exc).__module__ == "torch._dynamo.exc" or type(exc) is type(inner)
    return known and str(inner).strip() in str(exc)


def frames_of(exc: BaseException, model: nn.Module | None) -> tuple[Frame, ...]:
    """The frames that ``exc`` passed through, outermost first, without AmpCheck's own."""
    found: list[Frame] = []
    traceback = exc.__traceback__
    while traceback is not None:
        if not is_ours(traceback.tb_frame.f_code.co_filename):
            found.append(_frame(traceback.tb_frame, traceback.tb_lineno, traceback.tb_lasti))
        traceback = traceback.tb_next
    quoted = list(_USER_CODE.finditer(str(exc).partition("from user code:")[2]))
    found += [_quoted(match["file"], int(match["line"]), match["function"], model, found) for match in quoted]
    return tuple(found)


def still_running(exc: BaseException) -> tuple[Frame, ...]:
    """The frames that called the code that ``exc`` passed through and are still running, outermost first."""
    if exc.__traceback__ is None or any(_launches(frame.f_code) for frame, _ in walk_tb(exc.__traceback__)):
        return ()
    frame = exc.__traceback__.tb_frame.f_back
    running: list[Frame] = []
    while frame is not None and not _launches(frame.f_code):
        if not is_ours(frame.f_code.co_filename):
            running.append(_frame(frame, frame.f_lineno, frame.f_lasti))
        frame = frame.f_back
    return tuple(running[::-1])


def _launches(code: CodeType) -> bool:
    """Whether it runs a whole program: what called it is no part of that."""
    # Of the frames that launch it, Python 3.10 is shown the outermost alone.
    return code.co_name in ("run_script", "run_module", "run", "main") and is_ours(code.co_filename)


def _frame(running: FrameType, line: int, lasti: int) -> Frame:
    code = running.f_code
    remember_source(code.co_filename, running.f_globals)
    names = dict(running.f_locals)
    receiver = names.get(code.co_varnames[0]) if code.co_argcount else None
    if receiver is not None and code.co_varnames[0] != "self" and not _is_method(code, type(receiver)):
        receiver = None
    # `co_positions` came with Python 3.11.
    span: Span | None = None
    if hasattr(code, "co_positions") and lasti >= 0:
        position = next(itertools.islice(code.co_positions(), lasti // 2, None), None)
        if position is not None:
            first, last, left, right = position
            if first is not None and last is not None and left is not None and right is not None:
                span = first, last, left, right
    return Frame(code.co_filename, line, qualified_name(code), names, running.f_globals, span, receiver)


def _is_method(code: CodeType, kind: type) -> bool:
    """Whether ``code`` belongs to a method of ``kind``, also under decorators that keep ``__wrapped__``."""
    for base in kind.__mro__:
        method = vars(base).get(code.co_name)
        while method is not None:
            if getattr(method, "__code__", None) is code:
                return True
            method = getattr(method, "__wrapped__", None)
    return False


def _quoted(file: str, line: int, function: str, model: nn.Module | None, around: Sequence[Frame]) -> Frame:
    roots = [model] if model is not None else [frame.module for frame in around if frame.module is not None]
    owners = [
        module
        for module in (roots[0].modules() if roots else ())
        if (code := getattr(getattr(type(module), function.rpartition(".")[2], None), "__code__", None)) is not None
        and code.co_filename == file
        and code.co_firstlineno <= line <= max((entry[2] or 0 for entry in code.co_lines()), default=0)
    ]
    owner = owners[0] if len({id(module) for module in owners}) == 1 else None
    method = getattr(type(owner), function.rpartition(".")[2], None)
    names = {method.__code__.co_varnames[0]: owner} if method is not None else {}
    return Frame(file, line, function, names, getattr(method, "__globals__", {}), None, owner)


def sites(found: Sequence[Frame]) -> tuple[Site, ...]:
    """User frames innermost first, then library frames, PyTorch's last."""
    inward = found[::-1]
    return tuple(frame.site() for rank in range(3) for frame in inward if frame.library + is_torch(frame.file) == rank)


def phase_of(found: Sequence[Frame], given: str) -> str:
    """What the step was doing: ``forward``, ``backward``, ``scale``, ``unscale``, ``clip``, ``step``, ``update``; or
    ``given``, if the frames say nothing and it is not a training step."""
    in_module = False
    for frame in reversed(found):
        if frame.in_torch("autograd/__init__.py") or frame.in_torch("autograd/graph.py"):
            return "backward"
        if in_module:
            continue
        if frame.in_torch("nn/utils/clip_grad.py"):
            return "clip"
        if frame.in_torch(_SCALER):
            name = frame.function.rpartition(".")[2].strip("_").partition("_")[0]
            return {"unscale": "unscale", "update": "update", "scale": "scale", "apply": "scale"}.get(name, "step")
        if "/torch/optim/" in frame.file.replace("\\", "/") and is_torch(frame.file):
            return "step"
        in_module = frame.module is not None
    return "forward" if given.startswith("train") else given


def inner(found: Sequence[Frame]) -> Sequence[Frame]:
    """The frames inside the last call of the autograd engine or of a scaler, or all of them."""
    for index in range(len(found) - 1, -1, -1):
        if any(found[index].in_torch(path) for path in ("autograd/__init__.py", "autograd/graph.py", _SCALER)):
            return found[index + 1 :]
    return found


def root_of(found: Sequence[Frame], model: nn.Module | None) -> nn.Module | None:
    """The model or, if none was passed, the outermost module in the frames."""
    if model is not None:
        return model
    return next((frame.module for frame in found if frame.module is not None), None)


def user_code_first(found: Sequence[Frame]) -> Iterator[Frame]:
    """User frames, innermost first, then those of libraries other than PyTorch."""
    inward = found[::-1]
    yield from (frame for frame in inward if not frame.library)
    yield from (frame for frame in inward if frame.library and not is_torch(frame.file))
