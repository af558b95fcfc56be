"""Failures of autograd, as far as their messages describe them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch

from ampcheck.failure.code import assignments, expressions_at, read, site_in
from ampcheck.failure.dtypes import canonical
from ampcheck.failure.frames import Frame, Scene, user_code_first
from ampcheck.observe.walk import tensor_names
from ampcheck.trace import InferenceTensor, InternalOverlap, NoGraph, SavedTensorModified, Site, ViewFailure

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
    """Which tensor it is, as far as a name in the frames holds it."""
    use = next(use for use in _USES if scene.said.get(use))
    names = tensor_names(scene.root) if scene.root is not None else {}
    # PyTorch's own frames last: the user knows the tensor by another name.
    for frame in (*user_code_first(scene.found), *scene.found[::-1]):
        for expression, value in _read_in(frame):
            if not (isinstance(value, torch.Tensor) and value.is_inference()):
                continue
            if id(value) in names:
                return InferenceTensor(use, names[id(value)], stored=True)
            if not frame.library:
                return InferenceTensor(use, expression, made=_made(frame, expression))
    return InferenceTensor(use)


def _read_in(frame: Frame) -> Iterator[tuple[str, Any]]:
    """The expressions of the line that stand for a value, with it."""
    for node in expressions_at(frame):
        for one in ast.walk(node):
            if isinstance(one, (ast.Name, ast.Attribute, ast.Subscript)) and isinstance(one.ctx, ast.Load):
                yield ast.unparse(one), read(one, frame)


def _made(frame: Frame, expression: str) -> Site | None:
    """The only line that assigns a tensor to what ``expression`` names."""
    lines = {
        one.lineno
        for one in assignments(frame, expression)
        if one.value is not None and not isinstance(one.value, (ast.Constant, ast.Dict, ast.List))
    }
    return site_in(frame.file, lines.pop(), "call") if len(lines) == 1 else None


def no_graph(scene: Scene) -> NoGraph:
    return NoGraph(int(scene.said.get("element") or 0))


def internal_overlap(scene: Scene) -> InternalOverlap:
    return InternalOverlap(with_input=scene.said.get("input") is not None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None
