"""Replay a failing step with every operation logged, and try a remedy on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.observe.edited import CannotEdit, edited
from ampcheck.observe.probes.losses import LossProbe
from ampcheck.observe.replay import replay
from ampcheck.observe.step import WatchedStep
from ampcheck.trace import GraphTrace, Seen

Step = Callable[[], object]
# Out of place an operation may give another dtype than the tensor that it wrote to.
_TOLERANCE = 0.02


class FailedAgain(NamedTuple):
    """What a replay of a failing step showed. ``step`` is the step's place among those that were handed in, where it
    failed in the same way; ``losses`` are what its backward passes began with."""

    seen: Seen
    step: int | None
    losses: Sequence[float]


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
            seen, failed_again, losses = self._once(step, error)
            if failed_again or found is None:
                found = FailedAgain(seen, index if failed_again else None, losses)
            if failed_again and seen.graph is not None and explains(seen.graph):
                break
        return found

    def suspected(self, steps: Iterable[Step]) -> GraphTrace | None:
        """The graph of the first of ``steps`` in which backward used a stale or an unchecked tensor."""
        graphs = (self._once(step, None)[0].graph for step in steps)
        return next((replace(one, replay=None) for one in graphs if one and (one.stale or one.unchecked)), None)

    def runs_with(
        self, edit: tuple[str, int, str, str], steps: Callable[[], Iterable[Step]], failed: FailedAgain
    ) -> bool | None:
        """Whether the step that failed again runs with ``edit`` (file, line, what stands there, what to write), and
        computes the same loss. ``None``: it could not be tried."""
        if failed.step is None:
            return None
        try:
            with edited(*edit):
                step = next(islice(steps(), failed.step, None), None)
                if step is None:
                    return None
                probe = LossProbe()
                outcome = replay(
                    step,
                    lambda raised: probe.values,
                    model=self.model,
                    error=None,
                    probes=lambda: probe,
                    optimizers=self.optimizers,
                    scaler=self.scaler,
                )
        except CannotEdit:
            return None
        if outcome.seen is None:
            return None
        pairs = zip(failed.losses, outcome.seen, strict=False)
        same = all(math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-6) for one, other in pairs)
        return outcome.went_alike and same and len(outcome.seen) >= len(failed.losses)

    def _once(self, step: Step, error: Exception | None) -> tuple[Seen, bool, Sequence[float]]:
        runs: list[WatchedStep] = []

        def probes() -> WatchedStep:
            step = WatchedStep(
                "training", self.model, self.device_type, lambda *_: None, replayed=True, changed=self.changed
            )
            runs.append(step)
            return runs[-1]

        def examine(raised: BaseException | None) -> tuple[Any, GraphTrace | None, Sequence[float]]:
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
        shown, graph, losses = outcome.seen or (None, None, ())
        seen = Seen("training", shown, replace(graph or GraphTrace(), replay=outcome.said))
        return seen, outcome.went_alike, losses
