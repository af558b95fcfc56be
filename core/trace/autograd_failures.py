"""Failures of autograd. ``node`` and ``output`` are those that the message names: ``Relu``, output 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ampcheck.trace.site import Site


@dataclass(frozen=True)
class SavedTensorModified:
    """A saved tensor was modified before backward used it."""

    node: str | None = None
    output: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    version_found: int | None = None
    version_expected: int | None = None


@dataclass(frozen=True)
class LeafModified:
    """A leaf that requires grad was modified in place."""


@dataclass(frozen=True)
class ViewFailure:
    """A write to a view that autograd cannot track. ``mode`` is the grad mode that the view was made in."""

    node: str | None = None
    output: int | None = None
    mode: str | None = None


@dataclass(frozen=True)
class LeafViewModified(ViewFailure):
    """A view of a leaf was modified in place."""


@dataclass(frozen=True)
class MultiViewModified(ViewFailure):
    """One of several views that a function returned at once was modified in place."""


@dataclass(frozen=True)
class CustomFunctionViewModified(ViewFailure):
    """A view that a custom function returned was modified in place."""


@dataclass(frozen=True)
class NoGradViewModified(ViewFailure):
    """A view made without gradients was modified in place."""


@dataclass(frozen=True)
class ViewedBaseModified(ViewFailure):
    """The base of a view, or another view of that base, was modified in place."""


@dataclass(frozen=True)
class BackwardHookView(ViewFailure):
    """A tensor that a full backward hook wraps was modified in place."""


@dataclass(frozen=True)
class InferenceTensor:
    """Autograd was asked to save, modify or track a tensor made under ``inference_mode``.

    ``name`` is the parameter or buffer that it is, or the expression that holds it in the failing line, ``made`` the
    line that put it there, if there is one.
    """

    use: Literal["saved", "written", "leaf"]
    name: str | None = None
    stored: bool = False
    made: Site | None = None


@dataclass(frozen=True)
class GraphFreed:
    """Backward reached a part of the graph that an earlier backward had freed."""


@dataclass(frozen=True)
class NoGraph:
    """Backward ran on a tensor without a graph: the one at ``element``."""

    element: int = 0


@dataclass(frozen=True)
class InternalOverlap:
    """A write to elements that share memory with each other or, ``with_input``, with what the op reads."""

    with_input: bool = False
