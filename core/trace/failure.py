"""An exception, taken apart."""

from __future__ import annotations

from dataclasses import dataclass

from ampcheck.trace.autograd_failures import (
    BackwardHookView,
    CustomFunctionViewModified,
    GraphFreed,
    InferenceTensor,
    InternalOverlap,
    LeafModified,
    LeafViewModified,
    MultiViewModified,
    NoGradViewModified,
    NoGraph,
    SavedTensorModified,
    ViewedBaseModified,
)
from ampcheck.trace.dtype_failures import (
    AutocastCall,
    CustomFunctionState,
    DtypeMismatch,
    InPlaceDtype,
    NoNumpyDtype,
    OpNotImplemented,
    UnsafeLoss,
)
from ampcheck.trace.numbers import ValueRejected
from ampcheck.trace.scaler_failures import (
    FirstStepSkipped,
    FusedOptimizerClipping,
    LowPrecisionGradients,
    MissingGradients,
    ScalerArgument,
    ScalerOrder,
    ScalerWithoutBfloat16,
)
from ampcheck.trace.site import Site

Facts = (
    AutocastCall
    | DtypeMismatch
    | InPlaceDtype
    | OpNotImplemented
    | NoNumpyDtype
    | CustomFunctionState
    | UnsafeLoss
    | LowPrecisionGradients
    | MissingGradients
    | ScalerOrder
    | ScalerArgument
    | ScalerWithoutBfloat16
    | FusedOptimizerClipping
    | FirstStepSkipped
    | SavedTensorModified
    | LeafModified
    | LeafViewModified
    | MultiViewModified
    | CustomFunctionViewModified
    | NoGradViewModified
    | ViewedBaseModified
    | BackwardHookView
    | InferenceTensor
    | GraphFreed
    | NoGraph
    | InternalOverlap
    | ValueRejected
)
"""What is known about a failure, by its kind."""


def described(error: BaseException) -> str:
    """An exception as one string, which tells its facts from those of another exception."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Failure:
    """An exception, taken apart. ``facts`` are what its message and its frames say, if the kind of failure is known.
    ``chain`` holds ``(type, message)`` of it and of its causes, outermost first; ``sites`` the frames of the innermost
    one that matters, innermost first, user frames before library frames. ``internal_error`` is AmpCheck's own exception
    while it took this one apart."""

    type: str
    message: str
    phase: str
    step: int | None
    facts: Facts | None = None
    chain: tuple[tuple[str, str], ...] = ()
    sites: tuple[Site, ...] = ()
    module: str | None = None
    module_type: str | None = None
    internal_error: str | None = None

    @property
    def of_the_graph(self) -> bool:
        """Whether its cause lies in earlier calls, so that only a log of the step knows the lines."""
        return isinstance(
            self.facts, (SavedTensorModified, MultiViewModified, ViewedBaseModified, InferenceTensor, NoGraph)
        )
