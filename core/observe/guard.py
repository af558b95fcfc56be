"""Notice that a loss or a gradient is not finite, where backward and the optimizer are called anyway."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch

from ampcheck.observe.probes.containment import bare
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.state import random_state
from ampcheck.observe.tensors import is_readable, operands_in
from ampcheck.source.lines import callers
from ampcheck.trace import Root

# Gradients that are not finite make those of earlier layers not finite: a few, spread over the model, show it.
_SENTINELS = 6
_IN_FLIGHT = 8
# A scaler that searches its scale skips a few steps; one whose scale collapses skips many.
_LOOKED_AT = frozenset({1, 4, 16, 64})


class Noticed(NamedTuple):
    """What was not finite, in which optimizer step (from 0), and the random state that the step began with.

    ``late``: the optimizer may have stepped since. ``frame`` runs the step that is replayed.
    """

    root: Root
    frame: FrameType
    step: int
    random: tuple[Any, ...] | None
    loss: float | None
    late: bool = False


class _Count(NamedTuple):
    """The steps of an optimizer, and how many of them were skipped."""

    steps: int = 0
    skipped: int = 0


class _Flags(NamedTuple):
    ready: Any
    values: torch.Tensor
    step: int


class Guard:
    """Calls ``noticed`` once for a row of steps whose loss or gradients are not finite. If it returns that this was
    only the scale, it is called again as the row goes on.

    It listens to ``torch.autograd.backward``, ``GradScaler.step`` and the optimizers' steps in the thread that made it.
    It reads the losses, and the gradients of a few parameters; on an accelerator without waiting for it, so that it
    notices a step or so late. ``every``: it reads the gradients of all parameters, and waits.

    ``passes``: it ends after that many backward passes. ``began`` is the number of optimizer steps before it, if known.
    ``noticed`` may raise, into the program.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        noticed: Callable[[Noticed], bool],
        failed: Callable[[Exception], object],
        *,
        every: bool = False,
        passes: int | None = None,
        began: int | None = 0,
    ) -> None:
        self._counts: WeakKeyDictionary[Any, _Count] = WeakKeyDictionary()
        self._most = _Count()
        self._parameters = [one for one in parameters if one.requires_grad]
        self._noticed, self._failed = noticed, failed
        self._every, self._passes, self._began = every, passes, began
        self._sentinels: Sequence[torch.Tensor] = ()
        self._known = {id(one) for one in self._parameters}
        self._others: WeakKeyDictionary[Any, Sequence[ref[torch.Tensor]]] = WeakKeyDictionary()
        self._heard: set[FunctionType] = set()
        self.random: tuple[Any, ...] | None = None
        self._in_a_row = 0
        self._before = 0
        self._bad = False
        self._stepped = False
        self._told = False
        self._pending: deque[_Flags] = deque()
        self._owner = os.getpid(), threading.get_ident()
        self._listening = Listening()

    @property
    def step(self) -> int:
        """The number of optimizer steps that have ended, or were skipped, of the optimizer that made most."""
        return self._most.steps

    @property
    def skipped(self) -> int:
        """How many of them a gradient scaler skipped."""
        return self._most.skipped

    def number_of(self, step: int) -> int | None:
        """The number of a step of this guard among all of the fit; ``None`` if it is not known."""
        return None if self._began is None else self._began + step

    @property
    def active(self) -> bool:
        return bool(self._parameters)

    def begin(self) -> None:
        scaler = torch.amp.GradScaler
        self.random = random_state()
        self._listening.to(torch.autograd.backward, after=self._went_back)
        self._listening.to(scaler.step, before=self._scaler_will_step, after=self._scaler_stepped)
        self._listening.to(torch.optim.Optimizer._optimizer_step_code, before=self._optimizer_steps)

    def end(self) -> None:
        self._listening.end()
        self._parameters, self._sentinels = [], ()
        self._others.clear()
        self._pending.clear()
        # Frames of an exception hold the code that calls this guard, which the garbage collector does not look into.
        self._noticed, self._failed = _nothing, _nothing

    def _mine(self) -> bool:
        return (os.getpid(), threading.get_ident()) == self._owner and not torch.compiler.is_dynamo_compiling()

    def _went_back(self, result: Any, tensors: Any, *args: Any, **kwargs: Any) -> None:
        if not self._mine() or torch._C._current_graph_task_id() != -1:
            return
        noticed: Noticed | None = None
        try:
            with alone():
                noticed = self._look(tensors, next(callers(sys._getframe(1))))
        except RecursionError:
            return
        except Exception as error:  # noqa: BLE001 - ours, not the training's
            self._fail(error)
            return
        self._tell(noticed)
        if self._passes is not None:
            self._passes -= 1
            if self._passes <= 0:
                self.end()

    def _look(self, tensors: Any, frame: FrameType) -> Noticed | None:
        losses = [one for one in operands_in((tensors,)) if _is_looked_at(one)]
        gradients = self._gradients()
        if not losses or _capturing():
            return None
        if any(one.device.type != "cpu" for one in losses) and not self._every:
            return self._in_time(losses, gradients, frame)
        root: Root | None = None
        if not all(map(_finite, losses)):
            root = "loss"
        elif not all(map(_finite, gradients)):
            root = "gradient"
        if root is None:
            return None
        value = sum(float(one.detach().double().sum()) for one in losses)
        return Noticed(root, frame, self.step, self.random, value)

    def _gradients(self) -> list[torch.Tensor]:
        if self._every:
            return [one.grad for one in self._parameters if one.grad is not None and _is_looked_at(one.grad)]
        if not self._sentinels:
            self._sentinels = _spread(self._parameters)
        return [one.grad for one in self._sentinels if one.grad is not None and _is_looked_at(one.grad)]

    def _meet(self, optimizer: torch.optim.Optimizer) -> None:
        """From its next step on, look at the gradients that an optimizer of another model takes, on the CPU."""
        held = [one for group in optimizer.param_groups for one in group["params"]]
        if optimizer in self._others or not held or id(held[0]) in self._known or held[0].device.type != "cpu":
            return
        self._others[optimizer] = tuple(map(ref, _spread(held)))
        step = type(optimizer).step
        if isinstance(step, FunctionType) and step not in self._heard:
            self._heard.add(step)
            self._listening.to(step, before=self._other_will_step)

    def _other_will_step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        if self._bad or not self._mine() or optimizer not in self._others:
            return
        try:
            held = [one for one in (reference() for reference in self._others[optimizer]) if one is not None]
            gradients = [one.grad for one in held if one.grad is not None and _is_looked_at(one.grad)]
            with alone():
                finite = all(map(_finite, gradients))
            frame = next(callers(sys._getframe(1)))
        except Exception as error:  # noqa: BLE001
            self._fail(error)
            return
        if not finite:
            self._tell(Noticed("gradient", frame, self.step, self.random, None))

    def _in_time(
        self, losses: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], frame: FrameType
    ) -> Noticed | None:
        """Send the flags on their way, and read those that have arrived."""
        device = losses[0].device
        sums = [one.detach().float().sum() for one in losses]
        rest = [one.detach().float().sum() for one in gradients if one.device == device]
        flags = torch.stack([sum(sums[1:], sums[0]), *rest]) if rest else sums[0].reshape(1)
        values = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
        values.copy_(flags, non_blocking=True)
        ready = torch.Event(device.type)
        ready.record()
        self._pending.append(_Flags(ready, values, self.step))
        found: Noticed | None = None
        while self._pending and (len(self._pending) > _IN_FLIGHT or self._pending[0].ready.query()):
            if not self._pending[0].ready.query():
                self._pending.popleft()
                continue
            arrived = self._pending.popleft()
            if found is None and not bool(torch.isfinite(arrived.values).all()):
                root: Root = "gradient" if bool(torch.isfinite(arrived.values[0])) else "loss"
                late = arrived.step != self.step
                found = Noticed(root, frame, arrived.step, None, float(arrived.values[0]), late)
        return found

    def _tell(self, noticed: Noticed | None) -> None:
        if noticed is None:
            if self._stepped:
                self._in_a_row, self._stepped, self._told = 0, False, False
            return
        if self._bad:
            return
        self._bad = True
        self._in_a_row += 1
        if self._in_a_row in _LOOKED_AT and not self._told:
            self._told = not self._noticed(noticed)

    def _optimizer_steps(self, *args: Any, **kwargs: Any) -> None:
        if not self._mine():
            return
        try:
            optimizer = args[0]
            self._meet(optimizer)
            self._count(optimizer)
            self._stepped, self._bad = True, False
            if not _capturing():
                self.random = random_state()
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def _count(self, optimizer: Any, *, skipped: bool = False) -> None:
        before = self._counts.get(optimizer, _Count())
        count = self._counts[optimizer] = _Count(before.steps + 1, before.skipped + skipped)
        if count.steps >= self._most.steps:
            self._most = count

    def _scaler_will_step(self, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if self._mine():
            self._before = self._counts.get(optimizer, _Count()).steps

    def _scaler_stepped(self, result: Any, scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if not self._mine() or not scaler.is_enabled() or getattr(optimizer, "_step_supports_amp_scaling", False):
            return
        # PyTorch marks the steps that it counts; an optimizer may be none of its own.
        counted = getattr(type(optimizer).step, "hooked", False)
        if not counted or self._counts.get(optimizer, _Count()).steps != self._before:
            return
        noticed: Noticed | None = None
        try:
            if not self._bad:
                frame = next(callers(sys._getframe(1)))
                noticed = Noticed("gradient", frame, self.step, self.random, None)
            self._count(optimizer, skipped=True)
        except Exception as error:  # noqa: BLE001
            self._fail(error)
            return
        if noticed is not None:
            self._tell(noticed)
        self._bad = False

    def _fail(self, error: Exception) -> None:
        failed = self._failed
        self.end()
        failed(bare(error))


def _is_looked_at(tensor: torch.Tensor) -> bool:
    return is_readable(tensor) and tensor.is_floating_point() and tensor.numel() > 0


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _nothing(*_: Any) -> bool:
    return False


def _spread(parameters: Iterable[torch.Tensor]) -> Sequence[torch.Tensor]:
    """A few small parameters that have gradients, from all over a model."""
    trained = [one for one in parameters if one.grad is not None and _is_looked_at(one.grad)]
    share = max(1, -(-len(trained) // _SENTINELS))
    parts = (trained[start : start + share] for start in range(0, len(trained), share))
    return [min(part, key=torch.Tensor.numel) for part in parts]


def _finite(tensor: torch.Tensor) -> bool:
    # The sum of finite numbers may overflow: only then look at each.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
