"""All that is known about one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ampcheck.precision import Precision
from ampcheck.trace.comparison import Comparison
from ampcheck.trace.export import Export, ExportFailure
from ampcheck.trace.failure import Failure
from ampcheck.trace.graph import GraphTrace
from ampcheck.trace.model import Environment, Host, ModelInfo, OptimizerInfo, ScalerInfo
from ampcheck.trace.numbers import NonFinite, Skips, StateNotFinite
from ampcheck.trace.step import Phase, StepTrace


class Seen(NamedTuple):
    """What one step showed: its calls, and its autograd graph if that was watched."""

    phase: Phase
    step: StepTrace | None
    graph: GraphTrace | None


@dataclass(frozen=True)
class Trace:
    """All that is known about a run. A fact that was not observed is ``None``, and ``unobserved`` says why, by field.

    ``numbers`` are the steps that were not finite. ``exports`` are those that the run made; each is judged with its own
    ``comparison`` and ``export_failure``.

    ``internal_error`` is the exception that made AmpCheck switch itself off, in one line.
    """

    precision: Precision = field(default_factory=Precision)
    environment: Environment = field(default_factory=lambda: Environment(torch=""))
    host: Host | None = None
    model: ModelInfo | None = None
    optimizers: tuple[OptimizerInfo, ...] = ()
    scaler: ScalerInfo | None = None
    averaged: ModelInfo | None = None
    training: StepTrace | None = None
    evaluation: StepTrace | None = None
    failure: Failure | None = None
    graph: GraphTrace | None = None
    comparison: Comparison | None = None
    numbers: tuple[NonFinite, ...] | None = None
    state: StateNotFinite | None = None
    skips: Skips | None = None
    export_failure: ExportFailure | None = None
    exports: tuple[Export, ...] = ()
    unobserved: Mapping[str, str] = field(default_factory=dict)
    internal_error: str | None = None

    @property
    def uncompiled(self) -> Literal[True] | None:
        """True if nothing is compiled, so that the inside of the model was seen; else ``None``."""
        compiled = self.model is not None and self.model.compiled
        return None if compiled or (self.training is not None and not self.training.complete) else True

    def showing(self, seen: Seen) -> Trace:
        """This trace with what a step showed in place of what was known about its phase."""
        trace = self if seen.graph is None else replace(self, graph=seen.graph)
        if seen.step is None:
            return trace
        return replace(trace, training=seen.step) if seen.phase == "training" else replace(trace, evaluation=seen.step)
