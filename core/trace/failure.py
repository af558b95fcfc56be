"""An exception, taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ampcheck.trace.site import Site


def described(error: BaseException) -> str:
    """An exception in one string, by which the facts that belong to it are told from those of another."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Failure:
    """An exception, taken apart. ``chain`` holds ``(type, message)`` of it and of its causes, outermost first;
    ``sites`` the frames of the innermost one that matters, innermost first, user frames before library frames;
    ``fields`` what its message and its frames say (by the classifier that recognised it, ``kind``)."""

    type: str
    message: str
    phase: str
    step: int | None
    kind: str | None = None
    chain: tuple[tuple[str, str], ...] = ()
    sites: tuple[Site, ...] = ()
    module: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
