"""Run a step again whose loss or gradients were not finite: to see where that began, and in which precision not."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import graph as autograd_graph

from ampcheck.observe.autograd import leaves_behind
from ampcheck.observe.precisions import Changed, computed_in
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.probes.modules import ModuleProbe, on_module_calls
from ampcheck.observe.probes.numbers import NumberProbe
from ampcheck.observe.replay import replay
from ampcheck.observe.tensors import operands_in, tensors_in
from ampcheck.trace import NonFinite, Origin, Outcome, PathOp, Root

Step = Callable[[], object]
_OTHERS = (("float32", torch.float32), ("bfloat16", torch.bfloat16))


class _Shown(NamedTuple):
    root: Root | None
    loss: float | None
    parameters: tuple[str, ...]
    origin: Origin | None
    path: tuple[PathOp, ...]


@dataclass(frozen=True)
class Numbers:
    """Replays steps of ``model``, which trains on ``device_type``, for their numbers."""

    model: nn.Module
    device_type: str
    optimizers: Iterable[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler | None

    @property
    def scaling(self) -> bool:
        """Whether a gradient scaler skips the steps that are not finite."""
        return self.scaler is not None and self.scaler.is_enabled()

    def explained(
        self,
        steps: Callable[[], Iterable[Step]],
        *,
        random: tuple[Any, ...] | None = None,
        error: BaseException | None = None,
    ) -> NonFinite | None:
        """What the first of ``steps`` shows that is not finite again, with the loss scale 1; ``None`` without steps.

        ``random`` is the random state that the step began with, ``error`` what it raised.
        """
        shown: tuple[int, _Shown | None, str, Any] | None = None
        for index, step in enumerate(steps()):
            seen, said, seed = self._probed(step, random, error)
            if shown is None:
                shown = index, seen, said, seed
            # One that came to its backward pass has answered; those further out would run more of the program.
            if seen is not None and (seen.root is not None or seen.loss is not None):
                shown = index, seen, said, seed
                break
        if shown is None:
            return None
        index, seen, said, seed = shown
        if seen is None or seen.root is None:
            outcomes = {}
            if self.scaling and seen is not None and seen.loss is not None:
                outcomes["scale_1"] = Outcome(True, seen.loss)
            return NonFinite("loss", said=said, outcomes=outcomes)
        outcomes = {"scale_1": Outcome(False, seen.loss)} if self.scaling else {}
        for name, dtype in _OTHERS:
            step_again = next(islice(steps(), index, None), None)
            outcomes[name] = (
                Outcome(None, why="no replay") if step_again is None else self._outcome(step_again, dtype, seed, error)
            )
        origin = seen.origin
        if origin is not None and origin.kind == "constant-lost" and outcomes["float32"].finite is False:
            # With the constant as it is written, it is not finite either.
            origin = replace(origin, kind="singular", constant=None)
        return NonFinite(
            seen.root,
            loss=seen.loss,
            parameters=seen.parameters,
            origin=origin,
            path=seen.path,
            outcomes=outcomes,
            said=said,
        )

    def _probed(
        self, step: Step, random: Any, error: BaseException | None, within: Any = ExitStack
    ) -> tuple[_Shown | None, str, Any]:
        runs: list[_Probes] = []

        def probes() -> _Probes:
            runs.append(_Probes(self.model, self.device_type))
            return runs[-1]

        outcome = replay(
            self._changed(step, within),
            lambda raised: runs[-1].shown(error is not None),
            model=self.model,
            error=error if isinstance(error, Exception) else None,
            probes=probes,
            optimizers=self.optimizers,
            scaler=self.scaler,
            seed=random,
            again=lambda raised, seen: seen.root is not None,
        )
        for run in runs:
            run.numbers.clear()
        return outcome.seen, outcome.said, outcome.seed

    def _outcome(self, step: Step, dtype: torch.dtype, seed: Any, error: BaseException | None) -> Outcome:
        """How the step goes in ``dtype``. What an ``error`` refused need not have come to a backward pass."""
        within = functools.partial(computed_in, dtype, self.model, self.device_type)
        if error is not None:
            seen, said, _ = self._probed(step, seed, error, within)
            return Outcome(None if seen is None else seen.root is None, why=said)
        probe = _Finite()
        outcome = replay(
            self._changed(step, within),
            lambda raised: raised,
            model=self.model,
            error=None,
            probes=lambda: probe,
            optimizers=self.optimizers,
            scaler=self.scaler,
            seed=seed,
        )
        raised = outcome.seen
        if not outcome.ran:
            return Outcome(None, why=outcome.said)
        if raised is not None and (not probe.losses or probe.finite):
            return Outcome(None, why=f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}")
        if probe.error is not None or not probe.losses:
            return Outcome(None, why="it ran no backward pass")
        return Outcome(probe.finite, probe.losses[-1])

    def _changed(self, step: Step, within: Any = ExitStack) -> Changed:
        tensors = {id(one): one for one in self.model.parameters()}
        for optimizer in self.optimizers:
            tensors |= {id(one): one for group in optimizer.param_groups for one in group["params"]}
        return Changed(step, tensors.values(), self.scaler, within)


class _Probes:
    """The probes around a step that is replayed for its numbers."""

    def __init__(self, model: nn.Module, device_type: str) -> None:
        autocast = AutocastProbe()
        self._own = set(map(id, model.modules()))
        self._modules = ModuleProbe(model, device_type, autocast)
        self.numbers = NumberProbe(model, lambda: self._modules.current)
        self._around = (autocast, self._modules, self.numbers)
        self._stack = ExitStack()

    def __enter__(self) -> _Probes:
        self._stack.callback(on_module_calls(self._called))
        for probe in self._around:
            self._stack.callback(probe.__exit__, None, None, None)
            probe.__enter__()
        return self

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take the size of the batch from what the first module of the model is called with."""
        if not self.numbers.batch and id(module) in self._own:
            self.numbers.batch = tuple(one.shape[0] for one in tensors_in(list(args)) if one.dim())

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def shown(self, anything: bool) -> _Shown:
        for probe in self._around:
            if probe.error is not None:
                raise probe.error
        numbers = self.numbers
        root: Root | None = numbers.root
        origin, path = numbers.found(anything=anything)
        if root is None and origin is not None:
            root = "value"
        loss = numbers.losses[-1] if numbers.losses else None
        return _Shown(root, loss, tuple(numbers.bad_gradients), origin, path)


class _Finite:
    """Whether the losses of a replayed step, and the gradients of its leaves, are finite."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.finite = True
        self.losses: list[float] = []
        self._leaves: list[list[torch.Tensor]] = []
        self._thread = threading.get_ident()
        self._listening = Listening()

    def __enter__(self) -> _Finite:
        self._listening.to(autograd_graph._engine_run_backward, before=self._begins, after=self._ended)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()

    @contained
    def _begins(self, roots: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1:
            with alone():
                self.losses.append(sum(float(root.double().sum()) for root in roots))
                self.finite = self.finite and all(bool(torch.isfinite(root).all()) for root in roots)
                self._leaves.append(list(leaves_behind(list(roots))))

    @contained
    def _ended(self, result: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1 or not self._leaves:
            return
        leaves = self._leaves.pop()
        with alone():
            gradients = list(operands_in(result)) if isinstance(result, tuple) else []
            gradients = gradients or [leaf.grad for leaf in leaves if leaf.grad is not None]
            self.finite = self.finite and all(bool(torch.isfinite(one).all()) for one in gradients)
