"""Failures of a gradient scaler, and of an optimizer under one. ``optimizer`` is the name of its type, if known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ampcheck.trace.site import Site

WithoutGradient = Literal["frozen", "not-the-models", "no-gradient"]
Disorder = Literal["unscaled-twice", "unscaled-late", "stepped-twice", "never-scaled", "early-update"]


@dataclass(frozen=True)
class LowPrecisionGradients:
    """The scaler got float16 gradients: those of ``parameters``, out of the ``optimized`` ones in the optimizer.
    ``cast`` is the line that made them float16, if there is exactly one."""

    optimizer: str | None = None
    optimized: int = 0
    parameters: tuple[str, ...] = ()
    cast: Site | None = None


@dataclass(frozen=True)
class MissingGradients:
    """None of the ``optimized`` parameters has a gradient: their names by reason, and how many parameters outside the
    optimizer have one."""

    optimizer: str | None = None
    optimized: int = 0
    without_gradient: Mapping[WithoutGradient, tuple[str, ...]] = field(default_factory=dict)
    gradients_elsewhere: int = 0


@dataclass(frozen=True)
class ScalerOrder:
    """The scaler's methods were called in the wrong order."""

    reason: Disorder
    optimizer: str | None = None


@dataclass(frozen=True)
class ScalerArgument:
    """The scaler, or its ``step``, got an argument that it does not take, or an ``init_scale`` that is not a number
    (``value``). ``call`` is the call in the source, ``corrected`` what to write instead."""

    argument: str
    value: str | None = None
    scaler: str = "GradScaler"
    call: str | None = None
    corrected: str | None = None


@dataclass(frozen=True)
class ScalerWithoutBfloat16:
    """The scaler has no kernel for bfloat16 gradients."""


@dataclass(frozen=True)
class FusedOptimizerClipping:
    """The host refuses to clip gradients that the optimizer unscales itself."""


@dataclass(frozen=True)
class FirstStepSkipped:
    """A scheduler's warning, raised as an error: it stepped before the optimizer."""
