"""Child processes that train: what ``torch.multiprocessing.spawn`` and ``multiprocessing.Process`` run."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.loops.caught import Caught
from ampcheck.loops.watch import watch
from ampcheck.observe.probes.containment import hide_frame, undo
from ampcheck.observe.probes.listening import Listening
from ampcheck.report import Report
from ampcheck.report.report import write_json
from ampcheck.source.lines import is_library

_RUNS = ("_target", "_args")

FOUND = 3
"""The exit status of a process in which a finding reached ``fail_on``."""


class Children:
    """Has each child process that runs a function of the program watched as the parent is, while it is open.

    A process is given another function to run in place of its own, and shows its own again once it has started.
    Workers of a library (a data loader's, a pool's) run a function of the library, and are left alone. ``options`` are
    those of ``AmpChecker``. The report of a child stands beside the parent's, with the child's number in its name.
    """

    def __init__(self, options: Mapping[str, Any], fault: Callable[[Exception], None]) -> None:
        self._options = dict(options)
        self._fault = fault
        self._before: list[object] = []
        self._own: dict[int, dict[str, Any]] = {}
        self._held = ExitStack()

    def __enter__(self) -> Children:
        listening = Listening()
        self._held.callback(undo, listening.end)
        try:
            listening.to(BaseProcess.start, before=self._starts, after=self._did_start, failed=self._failed_to_start)
        except Exception as error:  # noqa: BLE001 - promise: it never makes training fail
            self._held.close()
            self._fault(error)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held.close()

    @property
    def said(self) -> str:
        """Why training may not have been seen in this process; empty if no child was watched."""
        number = len(self._before)
        if not number:
            return ""
        reports = ", ".join(path.name for path in self.reports)
        many = f"{number} child processes were" if number > 1 else "a child process was"
        return f"{many} watched" + (f" and wrote {reports}" if reports else "")

    @property
    def reports(self) -> list[Path]:
        """The reports that the children have written."""
        given = self._options.get("report")
        if isinstance(given, bool) or given is None:
            return []
        paths = (_beside(given, number) for number in range(len(self._before)))
        return [path for path, before in zip(paths, self._before, strict=True) if _stamp(path) not in (None, before)]

    def merge_reports(self, own: Report | None) -> None:
        """Make the children's reports the parent's, if its ``own`` is of no model: the program trains in them alone."""
        if own is not None and own.trace.model is not None:
            return
        try:
            self._merge()
        except (OSError, ValueError) as error:
            self._fault(error)

    def _merge(self) -> None:
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.reports]
        if not found:
            return
        merged = dict(found[0])
        for one in found[1:]:
            merged["findings"] += [each for each in one["findings"] if each not in merged["findings"]]
            merged["failure"] = merged.get("failure") or one.get("failure")
        write_json(self._options["report"], merged)

    def _starts(self, process: BaseProcess) -> None:
        try:
            own = {name: vars(process)[name] for name in _RUNS}
            target, args = own["_target"], tuple(own["_args"])
            spawned = getattr(sys.modules.get("torch.multiprocessing.spawn"), "_wrap", None)
            options = self._options | {"report": _beside(self._options["report"], len(self._before))}
            if target is spawned and args and not _is_of_library(args[0]):
                vars(process)["_args"] = (functools.partial(run, args[0], options), *args[1:])
            elif target is not None and not _is_of_library(target):
                vars(process)["_target"] = functools.partial(run, target, options)
            else:
                return
            self._own[id(process)] = own
            self._before.append(_stamp(options["report"]))
        except Exception as error:  # noqa: BLE001
            self._fault(error)

    def _did_start(self, result: None, process: BaseProcess) -> None:
        own = self._own.pop(id(process), {})
        # A started process has let go of its function.
        vars(process).update({name: value for name, value in own.items() if name in vars(process)})

    def _failed_to_start(self, error: BaseException, process: BaseProcess) -> None:
        self._did_start(None, process)


def run(function: Callable[..., Any], options: Mapping[str, Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function in a child process, and watch it."""
    checker = AmpChecker(**options)
    try:
        watching = watch(None, checker=checker)
        watching.quiet = True
        with watching, Caught(checker):
            return function(*args, **kwargs)
    except FindingsError as error:
        sys.stderr.write(f"ampcheck  stopped by --fail-on: {error}\n")
        sys.exit(FOUND)
    except BaseException as error:
        hide_frame(error)
        raise


def _is_of_library(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code is None or is_library(code.co_filename)


def _stamp(path: Any) -> object:
    """What tells a file that was written anew from the one before; ``None`` if there is no file."""
    try:
        found = os.stat(path)
    except (OSError, TypeError):
        return None
    return found.st_mtime_ns, found.st_ino


def _beside(report: Any, number: int) -> Any:
    if isinstance(report, bool):
        return False
    path = Path(os.path.abspath(report))
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
