"""Exceptions of a training step that the program catches itself, before it goes on with the next one."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from traceback import walk_tb
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._guards import TracingContext

from ampcheck.checker import AmpChecker
from ampcheck.failure import SIGNATURES
from ampcheck.observe.probes.containment import bare, undo
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modules import on_module_failures
from ampcheck.report import Report
from ampcheck.source.lines import LISTENING, is_library, is_ours, is_torch
from ampcheck.source.syntax import tree_of

_NUMBER = "_ampcheck_diagnosed"
_CALL = nn.Module._call_impl.__code__
_SCALING = ("scale", "unscale_", "step", "update")


@dataclass
class _Fault:
    """A fault whose exception may be caught. ``early``: it came before anything was trained, and may be a probe."""

    report: Report
    note: str
    early: bool
    times: int = 1
    shown: bool = False
    told: bool = False


class Caught:
    """Diagnoses the exceptions of training steps that the program catches, while it is open.

    Listens where a step enters PyTorch (a module, backward, the scaler) and to tracebacks being shown, and looks at an
    exception as it leaves there, with all frames alive. Only one that some frame may catch is diagnosed here. Once it
    is known to be caught, because another one is raised or the program ends, its note is said, unless a traceback has
    shown it. Each fault is diagnosed and said once. A module that is called just to see whether it runs, or for whose
    result the handler finds a substitute, is no fault.
    """

    def __init__(self, checker: AmpChecker) -> None:
        self._checker = checker
        self._faults: dict[tuple[Any, ...], _Fault | None] = {}
        self._numbers: dict[int, _Fault] = {}
        self._trained = False
        self._busy = False
        self._held = ExitStack()

    def __enter__(self) -> Caught:
        try:
            self._listen()
        except Exception as error:  # noqa: BLE001 - promise: it never makes training fail
            self._held.close()
            self._checker.switch_off(error)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._held.close()
            self._tell(None if isinstance(exc, SystemExit) else exc)
            for one in _chain(exc):
                fault = self._numbers.get(getattr(one, _NUMBER, 0))
                # It was met before, and only then got its note.
                if fault is not None and hasattr(one, "add_note") and fault.note not in getattr(one, "__notes__", ()):
                    one.add_note(fault.note)
        except Exception as error:  # noqa: BLE001
            self._checker.switch_off(error)
        if exc is None and any(fault.told for fault in self._numbers.values()):
            self._checker.enforce()

    def _listen(self) -> None:
        doors, first = Listening(), Listening()
        for listening in (doors, first):
            self._held.callback(undo, listening.end)
        scaler: Any = torch.amp.GradScaler
        engine: Any = torch.autograd.graph._engine_run_backward
        for function in (engine, *(getattr(scaler, name) for name in _SCALING)):
            doors.to(function, failed=self._contained(lambda error, *args, **kwargs: self._failed(error)))
        doors.to(torch.autocast.__exit__, before=self._contained(self._region_left))
        doors.to(traceback.TracebackException.__init__, before=self._contained(self._shown))
        doors.to_attribute(threading, "excepthook", _showing_threads, self._contained(self._shown))

        def trained(*args: Any, **kwargs: Any) -> None:
            self._trained = True
            first.end()

        first.to(engine, after=trained)
        self._held.callback(undo, on_module_failures(self._contained(self._module_failed)))

    def _contained(self, callback: Callable[..., None]) -> Callable[..., None]:
        """Keep a callback from raising into the program."""

        def call(*args: Any, **kwargs: Any) -> None:
            try:
                callback(*args, **kwargs)
            except RecursionError:
                # The program is at the recursion limit.
                return
            except Exception as fault:  # noqa: BLE001
                self._checker.switch_off(bare(fault))

        return call

    def _region_left(self, region: torch.autocast, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        if error is not None:
            self._failed(error)

    def _module_failed(self, module: nn.Module, error: BaseException) -> None:
        if module.training and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self._failed(error, called=True)

    def _shown(self, self_: Any, kind: Any = None, error: Any = None, *args: Any, **kwargs: Any) -> None:
        if not isinstance(error, Exception):
            return
        fault = self._numbers.get(getattr(error, _NUMBER, 0))
        if fault is not None:
            fault.shown = hasattr(error, "add_note")
        elif not getattr(error, _NUMBER, 0) and _is_of_user(error):
            self._failed(error, showing=True)

    def _failed(self, error: BaseException, *, called: bool = False, showing: bool = False) -> None:
        if self._busy or not isinstance(error, Exception) or error.__traceback__ is None or not _is_known(error):
            return
        if torch.compiler.is_dynamo_compiling() or TracingContext.try_get() is not None:
            return
        self._busy = True
        try:
            self._examine(error, called, showing)
        finally:
            self._busy = False

    def _examine(self, error: Exception, called: bool, showing: bool) -> None:
        if getattr(error, _NUMBER, 0):
            return
        whole, running = _whole(error)
        if any(frame.f_code is _CALL for frame, _ in running[1:]):
            return
        key = _key(error, whole)
        if key in self._faults:
            self._tell(error)
            self._met_again(error, self._faults[key])
            return
        handler = next(filter(None, (_handler(frame, line, error) for frame, line in running)), None)
        if (handler is not None and handler.leaves) or (handler is None and not showing):
            return
        if all(is_library(frame.f_code.co_filename) for frame, _ in walk_tb(whole)):
            # A pool of threads passes it on to a line of the user's.
            return
        if called and (_is_tried_out(running) or (handler is not None and handler.substitutes)):
            return
        self._tell(error)
        left, error.__traceback__ = error.__traceback__, whole
        notes = len(getattr(error, "__notes__", ()))
        try:
            report = self._checker.diagnose_caught(error)
        finally:
            error.__traceback__ = left
        new = getattr(error, "__notes__", [])[notes:]
        fault = _Fault(report, new[0], early=called and not self._trained) if report is not None and new else None
        self._faults[key] = fault
        if fault is not None:
            self._numbers[getattr(error, _NUMBER, 0)] = fault
            # Without `add_note` it was said at once.
            fault.shown = showing or not hasattr(error, "add_note")

    def _met_again(self, error: Exception, fault: _Fault | None) -> None:
        if fault is None:
            return
        fault.times += 1
        setattr(error, _NUMBER, next(number for number, one in self._numbers.items() if one is fault))

    def _tell(self, leaving: BaseException | None) -> None:
        """Tell the faults whose exception is gone: those that ``leaving`` does not come from."""
        numbers = {getattr(one, _NUMBER, 0) for one in _chain(leaving)}
        for number, fault in self._numbers.items():
            probe = fault.early and fault.times == 1 and self._trained
            if number not in numbers and not fault.told and not probe:
                fault.told = True
                self._checker.survive(fault.report, "" if fault.shown else fault.note)


def _showing_threads(hook: Any, listeners: list[Any]) -> Any:
    def excepthook(args: Any) -> None:
        # The interpreter's own hook shows the notes, without the module `traceback`.
        for _, shown in listeners if hook is threading.__excepthook__ else ():
            shown(None, args.exc_type, args.exc_value)
        hook(args)

    return excepthook


class _Handler(NamedTuple):
    """What may catch an exception. ``substitutes``: it computes anew what failed. ``leaves``: it ends the program."""

    substitutes: bool = False
    leaves: bool = False


def _is_known(error: Exception) -> bool:
    return any(isinstance(error, one.types) and one.pattern.search(str(error)) for one in SIGNATURES)


def _is_of_user(error: BaseException) -> bool:
    """Whether a line of the user's own raised it, or called what raised it in PyTorch."""
    files = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    outside = next((file for file in reversed(files) if not is_torch(file) and not is_ours(file)), None)
    return outside is not None and not is_library(outside)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _whole(error: BaseException) -> tuple[TracebackType, list[tuple[FrameType, int]]]:
    """The traceback of an exception as it will be once it has left the program, and the frames still running."""
    whole = error.__traceback__
    assert whole is not None
    running = [(whole.tb_frame, whole.tb_lineno)]
    frame = whole.tb_frame.f_back
    while frame is not None and not _launches(frame.f_code):
        running.append((frame, frame.f_lineno))
        whole = TracebackType(whole, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return whole, running


def _launches(code: CodeType) -> bool:
    return is_ours(code.co_filename) and code.co_filename != LISTENING


def _key(error: BaseException, whole: TracebackType) -> tuple[Any, ...]:
    lines = [(frame.f_code.co_filename, line) for frame, line in walk_tb(whole)]
    users = [line for line in lines if not is_library(line[0])]
    return type(error), re.sub(r"\d+", "", str(error)), *users[-2:]


def _handler(frame: FrameType, line: int, error: Exception) -> _Handler | None:
    """The handler in a frame that may catch the exception, as far as the source tells."""
    file = frame.f_code.co_filename
    if is_torch(file) or is_ours(file):
        return None
    for node in _around(frame, line):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            if any(re.search(r"\b(suppress|raises)\(", ast.unparse(item.context_expr)) for item in node.items):
                return _Handler()
            continue
        handler = next((one for one in node.handlers if _catches(one.type, frame, error)), None)
        if handler is not None and not isinstance(handler.body[-1], ast.Raise):
            return _Handler(not is_library(file) and _substitutes(node, handler), _leaves(handler))
    return None


def _leaves(handler: ast.ExceptHandler) -> bool:
    calls = (one.value.func for one in handler.body if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call))
    return any(ast.unparse(call) in ("sys.exit", "exit", "quit", "os._exit") for call in calls)


def _around(frame: FrameType, line: int) -> list[Any]:
    """The ``try`` and ``with`` statements whose body holds a line, innermost first."""
    found = _parsed(frame, ast.Try, ast.With, ast.AsyncWith, getattr(ast, "TryStar", ast.Try))
    holding = [node for node in found if node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0)]
    return sorted(holding, key=lambda node: -node.lineno)


def _catches(kind: ast.expr | None, frame: FrameType, error: Exception) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(name is None or isinstance(error, _resolved(name, frame)) for name in names)


def _resolved(name: ast.expr, frame: FrameType) -> Any:
    """The class that a handler names; any exception if that is not known."""
    found = _looked_up(name, frame)
    return found if isinstance(found, (type, tuple)) else Exception


def _looked_up(name: ast.expr, frame: FrameType) -> Any:
    """What a name, or an attribute of one, stands for in a frame; ``None`` if that is not known."""
    if isinstance(name, ast.Name):
        scopes = (frame.f_locals, frame.f_globals, vars(builtins))
        return next((scope[name.id] for scope in scopes if name.id in scope), None)
    if isinstance(name, ast.Attribute):
        owner = _looked_up(name.value, frame)
        # A property would run the program's code.
        return inspect.getattr_static(owner, name.attr, None) if owner is not None else None
    return None


def _substitutes(node: ast.Try, handler: ast.ExceptHandler) -> bool:
    """Whether a handler computes in another way what the body was to compute."""
    wanted = set[str]().union(*map(_stored, node.body))
    for part in handler.body:
        for one in ast.walk(part):
            if isinstance(one, ast.Return) and isinstance(one.value, ast.Call):
                return True
            if isinstance(one, ast.Attribute) and one.attr == "backward":
                return True
            if isinstance(one, ast.Assign) and not _is_nothing(one.value) and wanted & _stored(one):
                return True
    return False


def _stored(node: ast.AST) -> set[str]:
    names = (one for one in ast.walk(node) if isinstance(one, ast.Name))
    return {one.id for one in names if isinstance(one.ctx, ast.Store)}


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and not isinstance(node.value, bool)


def _is_tried_out(running: list[tuple[FrameType, int]]) -> bool:
    """Whether a module is called in a statement of its own, which drops the result."""
    users = ((frame, line) for frame, line in running if not is_library(frame.f_code.co_filename))
    frame, line = next(users, (None, 0))
    if frame is None:
        return False
    calls = [one.value for one in _parsed(frame, ast.Expr) if one.lineno <= line <= (one.end_lineno or 0)]
    return any(isinstance(one, ast.Call) and isinstance(_looked_up(one.func, frame), nn.Module) for one in calls)


def _parsed(frame: FrameType, *kinds: type[ast.AST]) -> list[Any]:
    """The nodes of some kinds in the file of a frame; none without its source."""
    tree = tree_of(frame.f_code.co_filename, frame.f_globals)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)] if tree is not None else []
