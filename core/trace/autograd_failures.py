"""Failures of autograd. ``node`` and ``output`` are those the message names: ``Relu``, output 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SavedTensorModified:
    """A saved tensor was written to before backward used it."""

    node: str | None = None
    output: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    version_found: int | None = None
    version_expected: int | None = None


@dataclass(frozen=True)
class LeafModified:
    """A leaf that requires grad was written to."""


@dataclass(frozen=True)
class ViewFailure:
    """A view that autograd cannot follow a write through. ``mode`` is the grad mode it was made in."""

    node: str | None = None
    output: int | None = None
    mode: str | None = None


@dataclass(frozen=True)
class LeafViewModified(ViewFailure):
    """A view of a leaf was written to."""


@dataclass(frozen=True)
class MultiViewModified(ViewFailure):
    """One of several views that a function returned at once was written to."""


@dataclass(frozen=True)
class CustomFunctionViewModified(ViewFailure):
    """A view that a custom function returned was written to."""


@dataclass(frozen=True)
class NoGradViewModified(ViewFailure):
    """A view made without gradients was written to."""


@dataclass(frozen=True)
class ViewedBaseModified(ViewFailure):
    """The base of a view, or another view of it, was written to."""


@dataclass(frozen=True)
class BackwardHookView(ViewFailure):
    """A tensor that a full backward hook wraps was written to."""


@dataclass(frozen=True)
class InferenceTensor:
    """A tensor made under ``inference_mode`` was to be saved for backward, was written to, or was to require grad."""

    use: Literal["saved", "written", "leaf"]


@dataclass(frozen=True)
class GraphFreed:
    """Backward reached a part of the graph that an earlier backward had freed."""


@dataclass(frozen=True)
class NoGraph:
    """Backward was run on a tensor without a graph: the one at ``element``."""

    element: int = 0


@dataclass(frozen=True)
class InternalOverlap:
    """A write to elements that share memory with each other, or with what is read."""
