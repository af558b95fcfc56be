"""Run any training script under the checker: ``ampcheck run train.py ...``."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.loops.caught import Caught
from ampcheck.loops.children import FOUND, Children
from ampcheck.loops.launch import run_module, run_script, show_exception
from ampcheck.loops.watch import watch
from ampcheck.observe.probes.listening import Listening

INTERRUPTED = 130


def run(
    target: str,
    args: Sequence[str] = (),
    *,
    module: bool = False,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    fail_on: str = "never",
    watch_steps: int = 1,
    report: bool | str | os.PathLike[str] = False,
    exports: bool = True,
    numerics: str = "guard",
) -> int:
    """Run the script (or, with ``module``, the module) ``target`` with ``args`` as ``__main__``, under the checker.

    Returns the exit status: 0, 1 if the script died of an exception, which is shown as the interpreter shows it, or 3
    if a finding reached ``fail_on``. ``SystemExit`` of the script passes through. AmpCheck's own lines go to standard
    error. Raises ``ValueError`` for invalid options, before anything runs.
    """
    checker = AmpChecker(
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        watch_steps=watch_steps,
        report=report,
        exports=exports,
        numerics=numerics,
    )
    watching, children = watch(None, checker=checker), Children(checker.options, checker.switch_off)
    watching.elsewhere = lambda: children.said
    leaving = Listening()
    try:
        with ExitStack() as watched:
            watched.callback(leaving.end)
            watched.callback(lambda: children.merge_reports(checker.report))
            for one in (watching, children, Caught(checker)):
                watched.enter_context(one)
            leaving.to_attribute(os, "_exit", _ending, watched.close)
            (run_module if module else run_script)(target, args)
    except FindingsError as error:
        sys.stderr.write(f"ampcheck  stopped by --fail-on: {error}\n")
        return FOUND
    except KeyboardInterrupt as error:
        show_exception(error)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the script's own, shown as such
        show_exception(error)
        # A child process that was stopped by it.
        return FOUND if fail_on != "never" and getattr(error, "exit_code", None) == FOUND else 1
    return 0


def _ending(leave: Callable[[int], NoReturn], listeners: list[Any]) -> Callable[[int], NoReturn]:
    """``os._exit`` that first ends what would otherwise not be ended."""

    @functools.wraps(leave)
    def _exit(status: int) -> NoReturn:
        for _, end in (*listeners,):
            with contextlib.suppress(Exception):
                end()
        leave(status)

    return _exit
