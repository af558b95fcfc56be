"""Failures of the program's own checks on numbers."""

from __future__ import annotations

import re

from ampcheck.failure.frames import Scene
from ampcheck.trace import ValueRejected

_CHECK = re.compile(r"\bis_?(?:nan|finite|inf)\b")


def rejected_by_check(scene: Scene) -> ValueRejected | None:
    """``ValueRejected`` if the line that raised looks whether a number is finite."""
    raised = next((frame for frame in reversed(scene.found) if not frame.library), None)
    return ValueRejected() if raised is not None and _CHECK.search(raised.site().code) else None
