"""Replay a failing step with every operation logged, and try a remedy on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from ampcheck.observe.edited import CannotEdit, Edited
from ampcheck.observe.probes.losses import LossProbe
from ampcheck.observe.replay import Random, Replay, replay
from ampcheck.observe.step import WatchedStep
from ampcheck.trace import GraphTrace, Seen, StepTrace

Step = Callable[[], object]
Shown = tuple[StepTrace, GraphTrace | None, Sequence[float]]
# Out of place an operation may give a higher dtype than the tensor that it wrote to.
_EXACT, _LOW_PRECISION = 1e-6, 0.02


class FailedAgain(NamedTuple):
    """What a replay of a failing step showed. ``step`` is the step's place among those that were handed in, where it
    failed in the same way; ``losses`` are what its backward passes began with, ``seed`` what its random numbers were
    drawn from."""

    seen: Seen
    step: int | None
    losses: Sequence[float]
    seed: Random | None


@dataclass(frozen=True)
class Again:
    """Replays steps of ``model``, which trains on ``device_type``."""

    model: nn.Module
    device_type: str
    optimizers: Iterable[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler | None
    changed: frozenset[int] = frozenset()
    """The storages of parameters that the step is known to have changed: a replay finds them changed already."""

    def failing(
        self, error: Exception, steps: Iterable[Step], explains: Callable[[GraphTrace], bool]
    ) -> FailedAgain | None:
        """What the first of ``steps`` shows that fails like ``error`` and explains it.

        If none explains it: what the last one shows that fails like ``error``, else the first. ``None`` without steps.
        """
        found: FailedAgain | None = None
        for index, step in enumerate(steps):
            seen, outcome = self._once(step, error)
            if seen.graph is not None:
                seen = seen._replace(graph=replace(seen.graph, carried=getattr(step, "carried", None)))
            if outcome.went_alike or found is None:
                losses = outcome.seen[2] if outcome.seen is not None else ()
                found = FailedAgain(seen, index if outcome.went_alike else None, losses, outcome.seed)
            if outcome.went_alike and seen.graph is not None and explains(seen.graph):
                break
        return found

    def suspected(self, steps: Iterable[Step]) -> GraphTrace | None:
        """The graph of the first of ``steps`` in which backward used a stale or an unchecked tensor."""
        graphs = (self._once(step, None)[0].graph for step in steps)
        return next((replace(one, replay=None) for one in graphs if one and (one.stale or one.unchecked)), None)

    def runs_with(self, edit: Edited, steps: Callable[[], Iterable[Step]], failed: FailedAgain) -> bool | None:
        """Whether the step that failed again runs with ``edit``, with the same random numbers, and computes the same
        loss. ``None``: it could not be tried, or runs and has no loss to compare."""
        if failed.step is None:
            return None
        probe = LossProbe()
        try:
            with edit:
                step = next(islice(steps(), failed.step, None), None)
                if step is None:
                    return None
                outcome = replay(
                    step,
                    lambda raised: probe.values,
                    model=self.model,
                    error=None,
                    probes=lambda: probe,
                    optimizers=self.optimizers,
                    scaler=self.scaler,
                    seed=failed.seed,
                )
        except CannotEdit:
            return None
        if outcome.seen is None or probe.error is not None:
            return None
        if not outcome.went_alike:
            return False
        tolerance = _LOW_PRECISION if self._is_low_precision(failed) else _EXACT
        pairs = list(zip(failed.losses, outcome.seen, strict=False))
        return all(_close(one, other, tolerance) for one, other in pairs) if pairs else None

    def _is_low_precision(self, failed: FailedAgain) -> bool:
        autocast = failed.seen.step is not None and bool(failed.seen.step.in_force)
        return autocast or any(parameter.element_size() < 4 for parameter in self.model.parameters())

    def _once(self, step: Step, error: Exception | None) -> tuple[Seen, Replay[Shown]]:
        runs: list[WatchedStep] = []

        def probes() -> WatchedStep:
            step = WatchedStep(
                "training", self.model, self.device_type, lambda *_: None, replayed=True, changed=self.changed
            )
            runs.append(step)
            return step

        def examine(raised: BaseException | None) -> Shown:
            return runs[-1].trace(), runs[-1].graph(raised), runs[-1].losses

        outcome = replay(
            step,
            examine,
            model=self.model,
            error=error,
            probes=probes,
            optimizers=self.optimizers,
            scaler=self.scaler,
        )
        shown, graph, _ = outcome.seen or (None, None, ())
        return Seen("training", shown, replace(graph or GraphTrace(), replay=outcome.said)), outcome


def _close(one: float, other: float, tolerance: float) -> bool:
    return math.isclose(one, other, rel_tol=tolerance) or (math.isnan(one) and math.isnan(other))
