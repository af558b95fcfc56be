"""Replay a failing step with every operation logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ampcheck.observe.replay import replay
from ampcheck.observe.step import WatchedStep
from ampcheck.trace import GraphTrace, Seen

Step = Callable[[], object]


@dataclass(frozen=True)
class Again:
    """Replays steps of ``model``, which trains on ``device_type``."""

    model: nn.Module
    device_type: str
    optimizers: Iterable[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler | None

    def failing(self, error: Exception, steps: Iterable[Step], explains: Callable[[GraphTrace], bool]) -> Seen | None:
        """What the first of ``steps`` shows that fails like ``error`` and explains it.

        If none explains it: what the last one shows that fails like ``error``, else the first. ``None`` without steps.
        """
        found: Seen | None = None
        for step in steps:
            seen, failed_again = self._once(step, error)
            if failed_again or found is None:
                found = seen
            if failed_again and seen.graph is not None and explains(seen.graph):
                break
        return found

    def suspected(self, steps: Iterable[Step]) -> GraphTrace | None:
        """The graph of the first of ``steps`` in which backward used a stale or an unchecked tensor."""
        graphs = (self._once(step, None)[0].graph for step in steps)
        return next((replace(one, replay=None) for one in graphs if one and (one.stale or one.unchecked)), None)

    def _once(self, step: Step, error: Exception | None) -> tuple[Seen, bool]:
        runs: list[WatchedStep] = []

        def probes() -> WatchedStep:
            runs.append(WatchedStep("training", self.model, self.device_type, lambda *_: None, replayed=True))
            return runs[-1]

        def examine(raised: BaseException | None) -> tuple[Any, GraphTrace | None]:
            return runs[-1].trace(), runs[-1].graph(raised)

        outcome = replay(
            step,
            examine,
            model=self.model,
            error=error,
            probes=probes,
            optimizers=self.optimizers,
            scaler=self.scaler,
        )
        shown, graph = outcome.seen or (None, None)
        return Seen("training", shown, replace(graph or GraphTrace(), replay=outcome.said)), outcome.failed_again
