"""What every exported form can do: run, show what its modules compute, and show what is in its graph."""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ampcheck.export.eager import Call
from ampcheck.export.values import Inputs
from ampcheck.trace import OpaqueCall, Site


class Constant(NamedTuple):
    """A tensor constant of the graph.

    Without a value, it is one that the graph creates blank (``zeros``, ``empty``), and that only something outside the
    dispatcher can have filled.
    """

    module: str
    value: Tensor | None
    site: Site | None


class Cast(NamedTuple):
    """A cast to low precision."""

    module: str
    dtype: str
    site: Site | None


class TrainingOp(NamedTuple):
    """A dropout that drops, or a normalization by batch statistics."""

    op: str
    module: str
    site: Site | None


@dataclass(frozen=True)
class Visible:
    """The dtype and sizes that an export declares for an input; ``None`` for a size that may vary."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | None, ...] | None


class Value(NamedTuple):
    """A value of a flat graph.

    ``modules`` are those it was made in, outermost first, and ``users`` those of each use (``None``: it is an output).
    """

    tensor: Tensor
    modules: tuple[str, ...]
    users: Sequence[tuple[str, ...] | None]


POOLED = -1


def pooled(values: list[Value], named: Callable[[str], str]) -> list[Call]:
    """What crosses the border of each module in a flat graph.

    It does not tell the calls of one module apart; the last value of a module puts it in its place in the order.
    """
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    for tensor, modules, users in values:
        for module in reversed(modules):
            if any(user is None or module not in user for user in users):
                name = named(module)
                outputs[name] = [*outputs.pop(name, []), tensor]
        entered = {named(module) for user in users for module in user or () if module not in modules}
        for name in entered:
            inputs.setdefault(name, []).append(tensor)
    return [Call(name, "", POOLED, inputs.get(name, []), tensors) for name, tensors in outputs.items()]


def around(module: str) -> tuple[str, ...]:
    """``("", "a", "a.b")`` for ``a.b``."""
    parts = module.split(".") if module else []
    return tuple(".".join(parts[:length]) for length in range(len(parts) + 1))


def inside(module: str, outer: str) -> bool:
    return not outer or module == outer or module.startswith(f"{outer}.")


def _joined(path: str, part: str) -> Iterator[str]:
    names = path.split(".") if path else []
    for kept in range(len(names), -1, -1):
        full = ".".join([*names[:kept], part])
        if inside(full, path):
            yield full


class Exported(abc.ABC):
    """An exported model.

    ``format`` is what to call it, and ``practice`` whose tolerance it is held to. ``traced`` says that one run on an
    example made it, so that it does not claim to take other sizes. ``names`` maps every name of a module of the eager
    model to its first one (a module may have two parents), and ``parameters`` are the names of its forward's
    parameters.
    """

    format: str
    practice: str
    traced = False
    names: Mapping[str, str] = MappingProxyType({})
    parameters: tuple[str, ...] = ()

    def named(self, module: str) -> str:
        """The eager model's name for a module."""
        return self.names.get(module, module)

    def chain(self, parts: Iterable[str]) -> tuple[str, ...]:
        """The modules of the eager model that ``parts`` name, outermost first.

        A part is a path from the outermost module or from the one before it. It may repeat the last names of that one
        (``a.list.0``, ``list.0.1``), and carries a suffix if it is another call of the module.
        """
        path = ""
        for part in parts:
            for spelled in (part, re.sub(r"_\d+$", "", part)):
                found = next((full for full in _joined(path, spelled) if full in self.names), None)
                if found is not None:
                    path = found
                    break
        return around(path)

    @property
    def module(self) -> nn.Module | None:
        """The module that holds parameters and buffers, if there is one."""
        return None

    def arity(self) -> tuple[int, int] | None:
        """The smallest and the largest number of arguments, if known."""
        return None

    def check(self, inputs: Inputs) -> None:  # noqa: B027 - most forms take any inputs of the right number
        """Raise ``ValueError`` for inputs that cannot be passed to it."""

    def declared(self) -> tuple[Visible, ...]:
        """What it declares about its inputs, in order."""
        return ()

    def in_float32(self) -> Exported | None:
        """The same model with float32 parameters, if it can be had."""
        return None

    def written(self) -> set[str]:
        """The buffers that it writes, according to its graph."""
        return set()

    def resized_shapes(self, inputs: Inputs, *, double: bool = False) -> list[tuple[int, ...]] | None:
        """Other sizes that it claims to take, for every input tensor: one more, or twice as many.

        Returns ``None`` if it claims nothing.
        """
        return None

    @abc.abstractmethod
    def run(self, inputs: Inputs) -> Any:
        """Its outputs, on ``inputs`` that it may write to."""

    @abc.abstractmethod
    def calls(self, inputs: Inputs, seed: int) -> tuple[list[Call], str | None]:
        """What its modules computed, in order, and why that is incomplete."""

    @abc.abstractmethod
    def constants(self) -> Iterator[Constant]: ...

    @abc.abstractmethod
    def opaque_calls(self) -> Iterator[OpaqueCall]: ...

    @abc.abstractmethod
    def casts(self) -> Iterator[Cast]: ...

    @abc.abstractmethod
    def training_ops(self) -> Iterator[TrainingOp]: ...
