"""How the numbers of one run are looked at: a guard at each step, and a look where training stops anyway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import nn

from ampcheck.observe.finite import Scale, State
from ampcheck.observe.guard import Guard, Noticed
from ampcheck.observe.numbers import Numbers
from ampcheck.trace import NonFinite, Skips, StateNotFinite

# A run whose numbers fail in more ways than these has told enough.
_MOST_DIAGNOSES = 6
_MOST_REARMED = 6
# How many backward passes are looked at after something was wrong.
_REARMED = 8
_LATE = "the optimizer had stepped before it was noticed, so the replay ran with other weights"


class Numerics:
    """Looks at the numbers of a run of ``model``, which trains on ``device_type``.

    ``steps_of`` makes what computes the loss of a running step again, from the frame that runs it. ``found`` takes a
    step that was not finite and what a replay showed of it; it may raise, into the program. ``failed`` takes a fault of
    our own. ``every``: the guard looks at all gradients of each step.
    """

    def __init__(
        self,
        model: nn.Module,
        device_type: str,
        optimizers: Iterable[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler | None,
        averaged: nn.Module | None,
        *,
        steps_of: Callable[[FrameType], Iterable[Callable[[], object]]],
        found: Callable[[NonFinite], None],
        failed: Callable[[Exception], None],
        every: bool = False,
    ) -> None:
        self._model, self._device_type, self._optimizers = model, device_type, tuple(optimizers)
        self._steps_of, self._found, self._failed = steps_of, found, failed
        self._every = every
        self._scaler: torch.amp.GradScaler | None = None
        self._guard: Guard | None = None
        self._counting = False
        self._state = State(model, averaged)
        self._scale: Scale | None = None
        self._told: list[NonFinite] = []
        self._diagnosed = self._rearmed = 0
        self.first_step: int | None = 0
        """The number of optimizer steps before this fit; ``None``: steps cannot be numbered."""
        self.scaled_by(scaler)

    @property
    def scaling(self) -> bool:
        """Whether a gradient scaler skips the steps that are not finite."""
        return self._scaler is not None and self._scaler.is_enabled()

    def scaled_by(self, scaler: torch.amp.GradScaler | None) -> None:
        """Take in the scaler, where it showed itself later than the model."""
        self._scaler = scaler if scaler is not None else self._scaler
        if self._scale is None and self._scaler is not None and self.scaling:
            self._scale = Scale(self._scaler, self._optimizers)

    def begin(self, passes: int | None = None, began: int | None = 0) -> None:
        """Look at each step from now on, or at as many backward passes as ``passes``.

        ``began`` is the number of optimizer steps in this fit so far, if it is known.
        """
        if self._guard is not None and self._guard.active:
            return
        trained = [one for optimizer in self._optimizers for group in optimizer.param_groups for one in group["params"]]
        own = trained or self._model.parameters()
        self._counting = passes is None and self._guard is None
        self._guard = Guard(own, self._not_finite, self._failed, every=self._every, passes=passes, began=began)
        self._guard.begin()

    def end(self) -> None:
        """Stop looking."""
        if self._guard is not None:
            self._guard.end()

    def look(self, moment: str, steps: int | None = None) -> tuple[StateNotFinite | None, Skips | None]:
        """What of the weights and statistics is not finite now, and which steps were skipped since fit start."""
        with torch.no_grad():
            state = self._state.look(moment)
        if state is not None and self._told and not self.scaling:
            # That is what became of the step that was told.
            state = None
        if self._scale is None:
            return state, None
        if self._counting and self._guard is not None:
            return state, self._scale.look(self._guard.step, self._guard.skipped)
        return state, self._scale.look(steps)

    def rearm(self, steps: int | None) -> None:
        """Look at the next few steps, since something is wrong, after ``steps`` in this fit."""
        if self._rearmed < _MOST_REARMED:
            self._rearmed += 1
            self.begin(passes=_REARMED, began=steps)

    def rejected(
        self, error: BaseException, steps: Callable[[], Iterable[Callable[[], object]]], step: int | None
    ) -> NonFinite | None:
        """Where the value comes from that ``error`` refused for not being finite; ``None`` if it does not show."""
        if self._told:
            return None
        random = self._guard.random if self._guard is not None else None
        found = self._numbers().explained(steps, random=random, error=error)
        if found is None or found.origin is None:
            return None
        if step is None and self._guard is not None:
            step = self._number_of(self._guard.step)
        return replace(found, step=step)

    def _number_of(self, step: int) -> int | None:
        number = self._guard.number_of(step) if self._guard is not None else None
        return None if number is None or self.first_step is None else self.first_step + number

    def _numbers(self) -> Numbers:
        return Numbers(self._model, self._device_type, self._optimizers, self._scaler)

    def _not_finite(self, noticed: Noticed) -> bool:
        """Explain a step that is not finite. Returns whether only the loss scale was too large."""
        try:
            if self._diagnosed >= _MOST_DIAGNOSES:
                return False
            self._diagnosed += 1
            steps = functools.partial(self._steps_of, noticed.frame)
            found = self._as_noticed(self._numbers().explained(steps, random=noticed.random), noticed)
            if found.benign or (found.origin is None and found.root == "gradient" and self.scaling):
                # The scaler skips the step, as it should; without an origin there is nothing to tell of it.
                return True
            if not self.scaling:
                # The weights are lost with the next step of the optimizer, and with them what later steps could show.
                self.end()
            if any(_same_origin(found, one) for one in self._told):
                return False
            self._told.append(found)
        except Exception as error:  # noqa: BLE001 - ours, not the training's
            self._failed(error)
            return False
        self._found(found)
        return False

    def _as_noticed(self, found: NonFinite | None, noticed: Noticed) -> NonFinite:
        """What a replay found, with what was seen of the step itself."""
        if found is None:
            found = NonFinite(noticed.root, said="the failing batch could not be replayed")
        elif found.origin is None:
            found = replace(found, root=noticed.root)
        facts: dict[str, Any] = {"step": self._number_of(noticed.step)}
        if noticed.loss is not None:
            facts["loss"] = noticed.loss
        if self._scaler is not None and self.scaling:
            facts["scale"] = self._scaler.get_scale()
        return replace(found, approximate=_LATE if noticed.late else None, **facts)


def _same_origin(one: NonFinite, other: NonFinite) -> bool:
    if one.origin is None or other.origin is None:
        return one.origin is other.origin
    return (one.origin.op, one.origin.kind, one.origin.site) == (other.origin.op, other.origin.kind, other.origin.site)
