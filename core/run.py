"""The state of one run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn

from ampcheck.observe.again import Again
from ampcheck.observe.numerics import Numerics
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
    those that the program went on after. ``left`` are the positions of the exports whose exceptions left the program.
    ``find_batch`` finds the batch of a host's step in the frames that run it. ``thread`` is the one that trains.
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
    numerics: Numerics | None = None
    find_batch: FindBatch | None = None
    thread: int = field(default_factory=threading.get_ident)
    ended: bool = False
    left: set[int] = field(default_factory=set)

    @property
    def waiting(self) -> bool:
        """Whether no model has been attached yet."""
        return self.trace.model is None and not self.off and not self.ended

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
        """What replays steps of this run, as long as the run has a model, in the thread that trains it.

        From another thread, a replay would take back what the training does meanwhile.
        """
        if self.held is None or self.trace.model is None or threading.get_ident() != self.thread:
            return None
        return Again(self.held.model, self.trace.model.device_type, self.held.optimizers, self.held.scaler)

    def abandon(self) -> None:
        """Stop watching; the steps being watched show nothing."""
        if self.numerics is not None:
            self.numerics.end()
        self.training_left, self.evaluation_left = 0, False
        self.find_batch = None
        while self.open:
            self.open.pop().abandon()
