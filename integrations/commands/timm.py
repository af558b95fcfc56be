"""timm's train script, unmodified and checked: ``python -m ampcheck.integrations.timm train.py ...``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ampcheck import FindingsError, Session, run_script, show_exception, watch
from ampcheck.integrations.timm import say, wrap


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a train script under the checker. AmpCheck's options come before the script; the rest belongs to the script.

    The exit status is the script's, 3 if a finding reaches ``--fail-on``, or 2 for bad options.
    """
    parser = _Parser(
        prog="python -m ampcheck.integrations.timm",
        description="Run timm's train script, or a fork of it, unmodified, and check its mixed precision.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report to FILE as JSON")
    parser.add_argument("--watch-steps", metavar="N", type=int, default=1, help="how many updates to watch")
    parser.add_argument("--fail-on", default="never", help="stop with status 3 on a finding: error, warning or never")
    parser.add_argument(
        "--numerics", default="free", help="look for values that are not finite: off, free, guard or stop"
    )
    parser.add_argument("--select", metavar="CODES", default="", help="judge only these rules: AMP101,AMP2,...")
    parser.add_argument("--ignore", metavar="CODES", default="", help="do not judge these rules")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    script, report = options.script, options.json
    try:
        session = Session(
            select=options.select,
            ignore=options.ignore,
            fail_on=options.fail_on,
            watch_steps=options.watch_steps,
            report=report or True,
            numerics=options.numerics,
        )
    except ValueError as error:
        parser.error(str(error))
    if report and (report.is_dir() or not os.access(report.absolute().parent, os.W_OK)):
        parser.error(f"the report cannot be written to {str(report)!r}")
    if not os.path.isfile(script):
        parser.error(f"there is no script {script!r}")
    try:
        _run(script, options.args, session)
    except FindingsError as error:
        parser.exit(3, f"ampcheck  stopped by --fail-on: {error}\n")
    except Exception as error:  # noqa: BLE001 - it is the script's, and shown as the script's
        session.diagnose(error, phase="script")
        show_exception(error)
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _run(path: str, args: Sequence[str], session: Session) -> None:
    """Run the script; one unlike timm's is watched like any script."""
    with ExitStack() as watched:
        wrapped = False

        def before_main(main: ModuleType) -> None:
            nonlocal wrapped
            wrapped = wrap(main, session)
            if not wrapped:
                say(f"ampcheck  {path} has no train_one_epoch() and a main guard: watched as by `ampcheck run`")
                watched.enter_context(watch(None, checker=session.checker))

        watched.callback(session.checker.detach)
        run_script(path, args, before_main=before_main)
        if wrapped and session.checker.report is None:
            session.checker.nothing_seen("the script called neither train_one_epoch() nor validate()", emit=say)


if __name__ == "__main__":
    main()
