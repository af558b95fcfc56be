"""Failures of autograd, as far as their messages describe them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

from ampcheck.failure.dtypes import canonical
from ampcheck.failure.frames import Scene
from ampcheck.trace import InferenceTensor, InternalOverlap, NoGraph, SavedTensorModified, ViewFailure

View = TypeVar("View", bound=ViewFailure)

_USES: tuple[Literal["saved", "written", "leaf"], ...] = ("saved", "written", "leaf")


def saved_tensor_modified(scene: Scene) -> SavedTensorModified:
    said = scene.said
    shape = said.get("shape")
    return SavedTensorModified(
        node=said.get("node"),
        output=_number(said.get("output")),
        dtype=canonical(said.get("a")),
        shape=tuple(int(size) for size in shape.split(",") if size.strip()) if shape is not None else None,
        version_found=_number(said.get("version_found")),
        version_expected=_number(said.get("version_expected")),
    )


def view(kind: type[View]) -> Callable[[Scene], View]:
    """A function that reads the facts of a view failure of this kind."""
    return lambda scene: kind(scene.said.get("node"), _number(scene.said.get("output")), scene.said.get("mode"))


def inference_tensor(scene: Scene) -> InferenceTensor:
    return InferenceTensor(next(use for use in _USES if scene.said.get(use)))


def no_graph(scene: Scene) -> NoGraph:
    return NoGraph(int(scene.said.get("element") or 0))


def internal_overlap(scene: Scene) -> InternalOverlap:
    return InternalOverlap(with_input=scene.said.get("input") is not None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None
