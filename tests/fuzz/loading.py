"""A generated program as a file of its own, so that tracebacks and reports can show its lines."""

from __future__ import annotations

import itertools
from pathlib import Path
from traceback import walk_tb
from typing import Any

_NUMBER = itertools.count()


def load(source: str, folder: Path, names: dict[str, Any]) -> tuple[str, Any]:
    """The path of a new file with ``source``, and the ``forward`` that it defines."""
    path = folder / f"program{next(_NUMBER)}.py"
    path.write_text(source + "\n")
    exec(compile(source, str(path), "exec"), names)
    return str(path), names["forward"]


def line_of(error: Exception | None, path: str) -> int | None:
    """The innermost line of the program at ``path`` that ``error`` came through."""
    passed = walk_tb(error.__traceback__) if error is not None else ()
    lines = [line for frame, line in passed if frame.f_code.co_filename == path]
    return lines[-1] if lines else None
