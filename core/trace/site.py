"""A place in source code."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

Role = Literal["origin", "write", "save", "raise", "cast", "call"]


@dataclass(frozen=True)
class Site:
    """A place in source code: file, line and function, and what happened there."""

    file: str
    line: int
    function: str
    code: str = ""
    role: Role = "call"
    module: str | None = None
    op: str | None = None
    node: str | None = None
    slot: str | None = None

    def __str__(self) -> str:
        cell = cell_of(self.file)
        return f"{cell}, line {self.line}" if cell else f"{os.path.basename(self.file)}:{self.line}"


def cell_of(file: str) -> str | None:
    """The notebook cell that ``file`` stands for, as tracebacks name it: ``Cell In[2]``."""
    shell = sys.modules.get("IPython")
    try:
        named = shell.get_ipython().compile.format_code_name(file) if shell is not None else None
        return " ".join(named) if named else None
    except Exception:  # noqa: BLE001 - older ones name no cells, and in a script there is none
        return None
