"""The ``yolo`` command, checked: ``python -m ampcheck.integrations.ultralytics detect train ...``."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

from ultralytics.cfg import entrypoint
from ultralytics.engine.model import Model

from ampcheck import FindingsError
from ampcheck.integrations.ultralytics import AmpCheck


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``yolo`` command and check every model that it makes. AmpCheck's options come before its arguments.

    Exits with status 3 if a finding reaches ``--fail-on``, and 2 for bad options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ampcheck.integrations.ultralytics", add_help=False, allow_abbrev=False
    )
    for option in ("--select", "--ignore"):
        parser.add_argument(option, default=(), metavar="CODES")
    parser.add_argument("--fail-on", default="never")
    parser.add_argument("--watch-steps", default=1, type=int, metavar="N")
    parser.add_argument("--report", default=True, metavar="FILE")
    parser.add_argument("--numerics", default="free")
    parser.add_argument("--compare-export", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    try:
        check = AmpCheck(**vars(options))
    except ValueError as error:
        parser.error(str(error))

    model: Any = Model
    make = model.__init__

    @functools.wraps(make)
    def make_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        check.attach(self)

    # The command makes its model and trains it in one call.
    model.__init__ = make_checked
    sys.argv[1:] = rest
    try:
        entrypoint()
    except FindingsError as error:
        parser.exit(3, f"ampcheck: {error}\n")
    finally:
        model.__init__ = make


if __name__ == "__main__":
    main()
