"""A plain training loop: no host says when a step begins, so the model's calls and the optimizer's steps do."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, auto
from traceback import walk_stack, walk_tb
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.export.followed import FollowedExports
from ampcheck.loops.evaluation import FirstEvaluation
from ampcheck.loops.shown import (
    held_by,
    holder_of,
    is_idle,
    is_like,
    is_part,
    optimizers_of,
    precision_of,
    precision_with,
    scaler_of,
)
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import bare, undo
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modules import on_module_calls
from ampcheck.observe.step import WatchedStep
from ampcheck.observe.walk import anything_compiled, has_autocast_cache_fault, unwrapped
from ampcheck.precision import Precision
from ampcheck.report import Report
from ampcheck.report.teller import Emit
from ampcheck.trace import Host

# A scaler that skips the step, or gradient accumulation, must not keep the probes for long.
_MOST_FORWARDS = 8


class _State(Enum):
    """How far training has come in a watch."""

    WAITING = auto()
    """No training call of a module has been seen."""
    STEP = auto()
    """A step is being watched."""
    BETWEEN = auto()
    """The model is known, and its next call begins another step to watch or ends the watch."""
    DONE = auto()


@dataclass
class _Step:
    """A step being watched.

    ``equipped``: the model had an optimizer when it began. ``optimized``: one has stepped since, so the next call of
    the model begins another step.
    """

    watched: WatchedStep
    equipped: bool
    forwards: int = 1
    optimized: bool = False


class watch:
    """Watch a plain training loop: ``with ampcheck.watch(model, optimizer=optimizer, scaler=scaler): ...``

    The first call of ``model`` in training mode with gradients is the fit start and opens the watched step. The first
    such call after an ``optimizer.step()``, or ``model.eval()``, ends it. The first call after ``model.eval()`` is the
    watched evaluation step. After that nothing is left in place but that exports in the block are followed: each result
    is compared with its module as ``ampcheck.compare`` does, unless ``exports`` is false. An exception that leaves the
    block carries a note.

    ``model`` is the module that the loop calls; ``None`` takes the first one that trains. ``optimizer`` may be several.
    If they are not given, optimizers are looked for among the objects alive at fit start, by the parameters they hold,
    and the scaler is the one that the watched step uses. ``precision`` is what was asked for; by default, what is
    observed. The other options are those of ``AmpChecker``; ``checker`` replaces them with a checker made elsewhere.
    Raises ``TypeError`` for arguments of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        precision: Precision | None = None,
        checker: AmpChecker | None = None,
        host: Host | None = None,
        emit: Emit | None = None,
        directory: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"watch() takes the torch.nn.Module that trains, not {type(model).__name__}")
        given = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer or ()
        optimizers = list(given) if isinstance(given, Iterable) else [given]
        kinds: list[tuple[str, Any, Any]] = [
            *(("optimizer", one, torch.optim.Optimizer) for one in optimizers),
            ("scaler", scaler, torch.amp.GradScaler),
            ("precision", precision, Precision),
            ("emit", emit, Callable),
        ]
        for name, value, kind in kinds:
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
        if checker is not None and options:
            raise TypeError(f"give either checker= or the options of one ({', '.join(options)})")
        self._checker = AmpChecker(**options) if checker is None else checker
        self._model = model
        self._optimizers: list[torch.optim.Optimizer] = optimizers
        self._known: list[torch.optim.Optimizer] = []
        self._scaler = scaler
        self._precision = precision
        self._context: dict[str, Any] = {"host": host, "emit": emit, "directory": directory}
        self._state = _State.WAITING
        self._autocast = AutocastProbe()
        self._training = ExitStack()
        self._evaluation = FirstEvaluation(self._checker, self._roots, self._evaluation_began, self._contained)
        self._exports = FollowedExports(self._checker, self._give_up, emit=emit, directory=directory)
        self._outermost: nn.Module | None = None
        self._attached: nn.Module | None = None
        self._strangers: list[torch.optim.Optimizer] = []
        self._step: _Step | None = None
        self._stepped_elsewhere: set[int] = set()
        self._fault: Exception | None = None
        self._shown: tuple[Precision, torch.amp.GradScaler | None] = Precision(), None
        self._thread = os.getpid(), threading.get_ident()
        self.elsewhere: Callable[[], str] = str
        """Says at the end where else the program may have trained, if anywhere."""
        self.quiet = False
        """Whether to say nothing, and write nothing, if no training was seen."""

    @property
    def report(self) -> Report | None:
        """The report so far; ``None`` before the first training forward."""
        return self._checker.report

    def __enter__(self) -> watch:
        try:
            self._begin()
        except Exception as error:  # noqa: BLE001 - promise: it never makes training fail
            self._give_up(error)
        except BaseException:
            self._let_go()
            raise
        return self

    def _begin(self) -> None:
        self._thread = os.getpid(), threading.get_ident()
        self._wait()
        # It enters autocast itself, once, which the probe must not see.
        has_autocast_cache_fault()
        # Registered first, since entering may fail half-way.
        self._training.callback(undo, self._autocast.__exit__, None, None, None)
        self._autocast.__enter__()
        self._training.callback(undo, on_module_calls(self._contained(self._called)))
        steps = Listening()
        self._training.callback(undo, steps.end)
        steps.to(torch.optim.Optimizer._optimizer_step_code, before=self._stepped)
        self._evaluation.wait()
        if self._checker.follows_exports:
            self._exports.begin()

    def _wait(self) -> None:
        """Wait for the first call of a module that trains, wherever it comes from."""
        self._state, self._outermost, self._step = _State.WAITING, None, None
        self._autocast.waiting = True

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        swallowed: Exception | None = None
        try:
            swallowed = _swallowed(exc)
        except Exception as error:  # noqa: BLE001
            self._give_up(error)
        failure = exc if swallowed is None else swallowed
        ended = failure is None or isinstance(failure, SystemExit)
        try:
            if failure is not None:
                with contextlib.suppress(FindingsError):
                    self._safely(self._end_if_complete, failure)
                with contextlib.suppress(Exception):
                    self._take_scaler()
                self._checker.diagnose(failure, swallowed=swallowed is not None)
                if isinstance(failure, SystemExit) and failure.code not in (None, 0):
                    self._safely(self._checker.exited, failure)
            if self._fault is not None:
                self._give_up(self._fault)
            self._safely(self._end_step, None if ended else failure)
            if not isinstance(failure, FindingsError):
                with contextlib.suppress(*(() if failure is None else (FindingsError,))):
                    self._safely(self._checker.look, "at the end")
            if self._state is _State.WAITING and ended:
                self._contained(self._never_trained)()
        finally:
            try:
                self._let_go()
            finally:
                self._checker.detach()
                self._model = self._outermost = self._attached = self._scaler = None
                self._strangers = []
                self._optimizers, self._known, self._shown = [], [], (Precision(), None)

    def _end_if_complete(self, exc: BaseException) -> None:
        """End a step that was complete when something else raised. One with two optimizers may not be."""
        if self._step is not None and self._step.optimized and not _left_backward(exc):
            self._end_step()

    def _let_go(self) -> None:
        """Remove everything, even if one of the removals raises."""
        self._state = _State.DONE
        for close in (self._training.close, self._evaluation.close, self._exports.give_back):
            try:
                close()
            except Exception as error:  # noqa: BLE001
                self._checker.switch_off(error)

    def _give_up(self, error: Exception) -> None:
        self._let_go()
        self._checker.switch_off(error)

    def _safely(self, method: Callable[..., None], *args: Any) -> None:
        """Call ``method`` so that it can raise nothing but ``FindingsError``."""
        try:
            method(*args)
        except (FindingsError, RecursionError):
            raise
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def _never_trained(self) -> None:
        """Report what can be said without a training step, or that nothing can: silence is never ambiguous."""
        if self._model is not None:
            self._attach(self._model)
            return
        if self.quiet:
            return
        reason = "no training call of a module was seen"
        if anything_compiled():
            reason += "; a training step compiled as a whole (`@torch.compile`) shows none"
        if elsewhere := self.elsewhere():
            reason += f" in this process; {elsewhere}"
        self._checker.nothing_seen(reason, emit=self._context["emit"], directory=self._context["directory"])

    def _contained(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Limit ``hook`` to the process and thread that watch, and to raising nothing but ``FindingsError``.

        The first thread to train is the one that watches.
        """
        may_begin = hook == self._called

        def call(*args: Any) -> None:
            try:
                # Dynamo must trace the user's program alone; it also calls modules just for their shapes.
                if torch.compiler.is_dynamo_compiling() or TracingContext.try_get() is not None:
                    return
                process, thread = os.getpid(), threading.get_ident()
                begins = may_begin and self._state is _State.WAITING
                if process == self._thread[0] and (begins or thread == self._thread[1]):
                    with torch._C.DisableTorchFunction():
                        self._safely(hook, *args)
            except RecursionError:
                # At the recursion limit, no module is the outermost.
                return

        return call

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._fault is not None:
            raise self._fault
        step = self._step
        if step is not None and self._was_mistaken(step, module):
            self._checker.start_over()
            self._autocast.forget()
            self._wait()
        if self._state is _State.WAITING:
            if not self._begins_training(module):
                return
            self._thread = os.getpid(), threading.get_ident()
            self._outermost = module
            self._attach(self._model if self._model is not None else holder_of(module))
        elif not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1 or not self._is_model(module):
            return
        elif step is not None:
            if step.watched.inside_model:
                return
            step.forwards += 1
            if not step.optimized and step.forwards < _MOST_FORWARDS:
                return
            self._end_step()
        self._next_step(module)

    def _is_model(self, module: nn.Module) -> bool:
        """Whether this is a call of the model: of what was called first, or of what that turns out to be a part of."""
        if module is self._outermost:
            return True
        inside = self._step is not None and self._step.watched.inside_model
        if inside or self._outermost is None or not is_part(self._outermost, module):
            return False
        self._outermost = module
        return True

    def _next_step(self, module: nn.Module) -> None:
        self._state = _State.BETWEEN
        if self._checker.watching:
            watched = self._checker.training_step(self._autocast)
            if isinstance(watched, WatchedStep):
                self._autocast.waiting = False
                # A module may have a length, and be false where it is 0.
                whole = module if self._attached is None else self._attached
                own = {id(parameter) for parameter in whole.parameters()}
                equipped = any(own & held_by(optimizer) for optimizer in self._known)
                self._state, self._step = _State.STEP, _Step(watched.__enter__(), equipped)
        else:
            self._end_training()
            if not self._checker.watching_evaluation:
                self._evaluation.close()

    def _end_training(self) -> None:
        self._state = _State.DONE
        self._training.close()

    def _was_mistaken(self, step: _Step, module: nn.Module) -> bool:
        """Whether the open step is not a training step.

        Either a dry run of ``module`` began it, before there was an optimizer, or another model did, while an optimizer
        that trains ``module`` has stepped.
        """
        if step.optimized or step.equipped or step.watched.inside_model or not self._begins_training(module):
            return False
        if module is self._outermost:
            return bool(optimizers_of(module))
        return not self._stepped_elsewhere.isdisjoint(map(id, module.parameters()))

    def _begins_training(self, module: nn.Module) -> bool:
        if not module.training or not torch.is_grad_enabled():
            return False
        if self._model is not None:
            whole = unwrapped(self._model)
            if unwrapped(module) is whole:
                return True
            if not is_part(module, whole):
                return False
        # Older PyTorch leaves modules in compiled code, and the first one it calls is not the outermost.
        if any(frame.f_code.co_filename.startswith("<eval_with_key>") for frame, _ in walk_stack(sys._getframe(1))):
            return False
        return any(parameter.requires_grad for parameter in module.parameters())

    def _attach(self, module: nn.Module) -> None:
        self._attached = module
        self._known = self._optimizers or optimizers_of(module)
        self._stepped_elsewhere = set()
        scaler = self._scaler if self._scaler is not None else scaler_of(module)
        precision = self._precision or precision_of(module, scaler, self._autocast.around)
        self._shown = precision, scaler
        self._checker.attach(module, precision=precision, optimizers=self._known, scaler=scaler, **self._context)

    def _take_scaler(self) -> None:
        """Take the scaler from its use in the step, if none was given."""
        scaler = self._step.watched.scaler if self._step is not None else None
        precision, known = self._shown
        if self._scaler is None and scaler is not None and scaler is not known:
            self._shown = precision, scaler
            self._checker.scaled_by(scaler, self._precision or precision_with(scaler, precision))

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._fault is not None or (os.getpid(), threading.get_ident()) != self._thread:
            return
        try:
            held = held_by(optimizer)
            if self._attached is None or held.isdisjoint(map(id, self._attached.parameters())):
                self._stepped_elsewhere |= held
                # One that steps without a gradient was made for what the loop does not train.
                if self._step is not None and not self._known and is_idle(optimizer):
                    self._strangers.append(optimizer)
            elif self._step is not None:
                self._step.optimized = True
        except Exception as error:  # noqa: BLE001
            self._fault = bare(error)

    def _end_step(self, exc: BaseException | None = None) -> None:
        self._take_scaler()
        if self._attached is not None:
            alike = {id(one): one for one in self._strangers if is_like(one, self._attached)}
            if alike:
                self._checker.optimized_by(alike.values())
        self._strangers = []
        step, self._step = self._step, None
        if step is not None:
            self._state = _State.BETWEEN
            self._autocast.waiting = True
            try:
                step.watched.__exit__(type(exc) if exc else None, exc, None)
            finally:
                self._autocast.forget()

    def _roots(self) -> tuple[nn.Module, ...]:
        """The module that the loop calls, and the user's own module inside its wrappers."""
        called = [one for one in (self._outermost, self._attached) if one is not None]
        return tuple(root for one in called for root in (one, unwrapped(one)))

    def _evaluation_began(self) -> None:
        self._checker.look("before the first evaluation")
        if self._step is not None and self._step.optimized:
            self._end_step()
            if not self._checker.watching:
                self._end_training()


def _swallowed(exc: BaseException | None) -> Exception | None:
    """The error that a launcher showed in its own way before it left by ``sys.exit``, as Hydra does."""
    if not isinstance(exc, SystemExit) or exc.code in (None, 0):
        return None
    error = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    return error if isinstance(error, Exception) else None


def _left_backward(exc: BaseException) -> bool:
    """Whether an exception came out of a backward pass."""
    return any(frame.f_code.co_name == "_engine_run_backward" for frame, _ in walk_tb(exc.__traceback__))
