"""A place in source code."""

from __future__ import annotations

import os
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
        return f"{os.path.basename(self.file)}:{self.line}"
