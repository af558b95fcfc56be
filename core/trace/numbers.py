"""Numbers that failed: where a value stopped being finite, why, and in which precision it would not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ampcheck.trace.site import Site

Kind = Literal["overflow", "singular", "given", "masked", "constant-lost", "unjudged"]
NumericPhase = Literal["forward", "backward"]
Root = Literal["loss", "gradient", "value"]


@dataclass(frozen=True)
class OperandValues:
    """What an operand of an op holds: ``largest`` is the magnitude of its largest finite element; ``zeros``,
    ``negatives`` and ``not_finite`` count elements."""

    dtype: str
    shape: tuple[int, ...]
    largest: float | None = None
    zeros: int = 0
    negatives: int = 0
    not_finite: int = 0


@dataclass(frozen=True)
class Given:
    """A value that was not finite before any op of the step: an input, a parameter or a buffer, by its name."""

    what: Literal["input", "parameter", "buffer"]
    name: str | None


@dataclass(frozen=True)
class LostConstant:
    """A Python number that the dtype of an op rounds to 0 or to 1, and the line that has it."""

    value: float
    becomes: float
    dtype: str
    site: Site | None


@dataclass(frozen=True)
class Origin:
    """The op whose operands were finite and whose result is not.

    ``op`` is the op of the forward pass, also where its gradient failed; ``node`` is then the graph node. ``dtype`` is
    that of the result. ``true_value`` is what float64 gives for the element that is furthest from finite, ``limit`` the
    largest number of ``dtype``. ``count`` of ``size`` elements are not finite, those of the batch's ``samples``.
    ``given`` and ``fill`` (the line that wrote infinities on purpose) and ``constant`` say where it really comes from.
    """

    op: str
    kind: Kind
    phase: NumericPhase
    dtype: str
    site: Site | None
    module: str | None = None
    node: str | None = None
    true_value: float | None = None
    limit: float | None = None
    count: int = 0
    size: int = 0
    nan: bool = False
    operands: tuple[OperandValues, ...] = ()
    samples: tuple[int, ...] = ()
    given: Given | None = None
    fill: Site | None = None
    constant: LostConstant | None = None


@dataclass(frozen=True)
class PathOp:
    """An op between the origin and the loss, with the dtype of its result."""

    op: str
    dtype: str
    site: Site | None
    module: str | None
    phase: NumericPhase


@dataclass(frozen=True)
class Outcome:
    """How the batch went in one precision. ``finite``: whether its losses and gradients were; ``None``: not tried, or
    it did not run, and ``why`` says why."""

    finite: bool | None
    loss: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradients are not finite.

    ``root`` is what was not finite, ``parameters`` those whose gradient is not. ``origin`` is unknown if the replay was
    finite, or there was none: ``said`` tells. ``outcomes`` are those of replays of the same batch, by ``"float32"``,
    ``"bfloat16"`` and ``"scale_1"`` (as it ran, but with the loss scale 1; absent without a scaler). ``approximate``
    says what may differ from the step that failed.
    """

    root: Root
    step: int | None = None
    loss: float | None = None
    precision: str | None = None
    scale: float | None = None
    parameters: tuple[str, ...] = ()
    origin: Origin | None = None
    path: tuple[PathOp, ...] = ()
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    said: str | None = None
    approximate: str | None = None

    @property
    def benign(self) -> bool:
        """Whether only the loss scale was too large: the scaler skips the step, and lowers it."""
        scale_1 = self.outcomes.get("scale_1")
        return scale_1 is not None and scale_1.finite is True


@dataclass(frozen=True)
class StateNotFinite:
    """Parameters, buffers and averaged weights that are not finite, by name; ``moment`` says when that was seen."""

    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    moment: str = ""


@dataclass(frozen=True)
class Skips:
    """Optimizer steps that the scaler skipped since fit start. ``exact``: counted; otherwise at least so many."""

    skipped: int
    steps: int
    scale_before: float | None
    scale_now: float | None
    exact: bool = True


@dataclass(frozen=True)
class Updates:
    """What one optimizer step did to a low-precision parameter, in a sample of its elements: of ``with_gradient``
    elements ``unmoved`` kept their value. ``lr`` is the learning rate of that step, ``largest_lr`` the largest that
    the optimizer's group names: with that, ``would_move`` of the unmoved could move. ``bounded``: the optimizer moves
    no element by more than about the learning rate."""

    parameter: str
    module: str
    dtype: str
    with_gradient: int
    unmoved: int
    lr: float
    largest_lr: float
    would_move: int
    bounded: bool


@dataclass(frozen=True)
class ValueRejected:
    """A function refused a value because it is not finite, or the program's own check found one."""


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step, without the loss scale, in a sample of ``count`` elements: how many are ``zero``, how
    many of the others are ``subnormal`` in float16 at the loss ``scale``, the magnitude that 5 % of the others are
    ``below``, and the ``largest``."""

    count: int
    zero: int
    subnormal: int
    below: float
    largest: float
    scale: float

    @property
    def window(self) -> tuple[float, float] | None:
        """The loss scales at which nearly all of them are normal numbers of float16, from the least to the largest;
        ``None`` if all are zero."""
        return (2.0**-14 / self.below, 65504.0 / self.largest) if self.largest else None
