"""The state of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn

from ampcheck.observe.again import Again
from ampcheck.observe.finite import Scale, State
from ampcheck.observe.guard import Guard
from ampcheck.observe.numbers import Numbers
from ampcheck.observe.step import WatchedStep
from ampcheck.report import Report
from ampcheck.report.teller import Teller
from ampcheck.rules.rule import Finding
from ampcheck.trace import GraphTrace, Phase, Seen, StepTrace, Trace


class Held(NamedTuple):
    """The user's own objects. ``entry`` is what the loop calls, ``model`` the user's module inside it."""

    entry: nn.Module
    model: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    scaler: torch.amp.GradScaler | None
    averaged: nn.Module | None = None


Rerun = Callable[[], object]
FindBatch = Callable[[Iterable[FrameType]], "Rerun | None"]


@dataclass
class Run:
    """The state of one run.

    The run is attached while it holds the user's objects. ``open`` are the steps being watched, ``died`` is what the
    last one showed that an exception left, ``failures`` the reports on exceptions, and ``survived`` what was found on
    those that the program went on after. ``find_batch`` finds the batch of a host's step in the frames that run it.
    ``diagnosed`` counts the steps that were replayed because of their numbers, ``rearmed`` how often a look led to
    that. ``state`` and ``scale`` remember what was looked at before. ``first_step`` is the number of optimizer steps
    before this run, such as those before a resume, if the host knows it.
    """

    teller: Teller
    held: Held | None = None
    trace: Trace = field(default_factory=Trace)
    report: Report | None = None
    training_left: int = 0
    evaluation_left: bool = False
    open: list[WatchedStep] = field(default_factory=list)
    died: Seen | None = None
    failures: list[Report] = field(default_factory=list)
    survived: tuple[Finding, ...] = ()
    off: bool = False
    guard: Guard | None = None
    find_batch: FindBatch | None = None
    diagnosed: int = 0
    rearmed: int = 0
    state: State | None = None
    scale: Scale | None = None
    first_step: int | None = 0

    def expect(self, watch_steps: int, device_type: str) -> None:
        """Set what this run watches, and the reasons to give for what it has not yet watched."""
        unobserved = {
            "training": "no training step was watched",
            "evaluation": "no evaluation step was watched",
            "uncompiled": "what runs inside compiled code is not watched",
        }
        watchable = torch.amp.is_autocast_available(device_type)
        if not watchable:
            reason = f"the model is on the device {device_type!r}, for which PyTorch has no autocast"
            unobserved |= {"training": reason, "evaluation": reason}
        self.trace = replace(self.trace, unobserved=unobserved)
        self.training_left = watch_steps if watchable else 0
        self.evaluation_left = watchable and watch_steps > 0

    def take(self, phase: Phase, step: StepTrace, graph: GraphTrace | None) -> StepTrace:
        """Add what a step showed to what earlier steps of its phase did; return them as one."""
        earlier = self.trace.training if phase == "training" else self.trace.evaluation
        together = step if earlier is None else earlier.followed_by(step)
        self.trace = self.trace.showing(Seen(phase, together, graph))
        if phase == "evaluation":
            self.evaluation_left = False
        else:
            self.training_left -= 1
        return together

    def again(self) -> Again | None:
        """What replays steps of this run, as long as the run has a model."""
        if self.held is None or self.trace.model is None:
            return None
        return Again(self.held.model, self.trace.model.device_type, self.held.optimizers, self.held.scaler)

    @property
    def scaling(self) -> bool:
        """Whether a gradient scaler skips the steps that are not finite."""
        scaler = self.held.scaler if self.held is not None else None
        return scaler is not None and scaler.is_enabled()

    def numbers(self) -> Numbers | None:
        """What replays steps of this run for their numbers, as long as the run has a model."""
        if self.held is None or self.trace.model is None:
            return None
        return Numbers(self.held.model, self.trace.model.device_type, self.held.optimizers, self.held.scaler)

    def unguard(self) -> None:
        """Stop looking at the numbers."""
        guard, self.guard = self.guard, None
        if guard is not None:
            guard.end()

    def abandon(self) -> None:
        """Stop watching; the steps being watched show nothing."""
        self.unguard()
        self.training_left, self.evaluation_left = 0, False
        self.find_batch = self.state = self.scale = None
        while self.open:
            self.open.pop().abandon()
