"""A plain training loop: no host says when a step begins, so the model's calls and the optimizer's steps do."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from traceback import walk_stack, walk_tb
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.observe.probes.autocast import AutocastProbe, autocast_state
from ampcheck.observe.probes.containment import bare, undo
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modules import on_module_calls
from ampcheck.observe.step import WatchedStep
from ampcheck.observe.walk import anything_compiled, dtype_name, has_autocast_cache_fault, unwrapped
from ampcheck.precision import Precision
from ampcheck.report import Report
from ampcheck.report.teller import Emit
from ampcheck.trace import Host


class watch:
    """Watch a plain training loop: ``with ampcheck.watch(model, optimizer=optimizer, scaler=scaler): ...``

    The first call of ``model`` in training mode with gradients is the fit start and opens the watched step; the first
    such call after an ``optimizer.step()``, or ``model.eval()``, ends it. The first call after ``model.eval()`` is the
    watched evaluation step. After them nothing is left in place. An exception that leaves the block carries a note.

    ``model``: the module the loop calls; ``None`` takes the first one that trains. ``optimizer`` may be several.
    What is not given of ``optimizer`` and ``scaler`` is looked for: optimizers among the objects that are alive at fit
    start, by the parameters they hold; the scaler is the one that the watched step uses.
    ``precision`` is what is asked for; by default, what is observed. The other options are those of ``AmpChecker``;
    ``checker`` is one made elsewhere, in place of them. Raises ``TypeError`` for what is of another type.
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
        self._scaler = scaler
        self._precision = precision
        self._context: dict[str, Any] = {"host": host, "emit": emit, "directory": directory}
        self._autocast = AutocastProbe()
        self._training = ExitStack()
        self._evaluation = ExitStack()
        self._listening = ExitStack()
        self._step: WatchedStep | None = None
        self._outermost: nn.Module | None = None
        self._optimized = False
        self._equipped = False
        self._elsewhere: set[int] = set()
        self._fault: Exception | None = None
        self._forwards = 0
        self._shown: tuple[Precision, torch.amp.GradScaler | None] = Precision(), None
        self._place = os.getpid(), threading.get_ident()

    @property
    def report(self) -> Report | None:
        """What is known so far; ``None`` before the first training forward."""
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
        self._place = os.getpid(), threading.get_ident()
        self._step = self._outermost = None
        self._optimized = False
        self._autocast.waiting = True
        # It enters autocast itself, once: not under the probe.
        has_autocast_cache_fault()
        # Ahead of its entry, which may fail half-way.
        self._training.callback(undo, self._autocast.__exit__, None, None, None)
        self._autocast.__enter__()
        self._training.callback(self._listening.close)
        self._listen()
        steps = Listening()
        self._training.callback(undo, steps.end)
        steps.to(torch.optim.Optimizer._optimizer_step_code, before=self._stepped)
        self._await_evaluation()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = exc is None or isinstance(exc, SystemExit)
        try:
            if exc is not None:
                with contextlib.suppress(FindingsError):
                    self._safely(self._end_if_complete, exc)
                with contextlib.suppress(Exception):
                    self._take_scaler()
                self._checker.diagnose(exc)
            if self._fault is not None:
                self._give_up(self._fault)
            self._safely(self._end_step, None if ended else exc)
            if self._outermost is None and ended:
                self._contained(self._never_trained)()
        finally:
            try:
                self._let_go()
            finally:
                self._checker.detach()
                self._model = self._outermost = self._scaler = None
                self._optimizers, self._shown = [], (Precision(), None)

    def _end_if_complete(self, exc: BaseException) -> None:
        """End the step where it was complete when something else raised. One with two optimizers may not be."""
        if self._optimized and not _left_backward(exc):
            self._end_step()

    def _let_go(self) -> None:
        """Remove everything. What one removal raises keeps no other from being done."""
        for stack in (self._training, self._evaluation):
            try:
                stack.close()
            except Exception as error:  # noqa: BLE001
                self._checker.switch_off(error)

    def _give_up(self, error: Exception) -> None:
        self._let_go()
        self._checker.switch_off(error)

    def _safely(self, method: Callable[..., None], *args: Any) -> None:
        """Call ``method``, which can raise nothing then but ``FindingsError``."""
        try:
            method(*args)
        except (FindingsError, RecursionError):
            raise
        except Exception as error:  # noqa: BLE001
            self._give_up(error)

    def _never_trained(self) -> None:
        """Silence is never ambiguous: what can be told without a training step, or that nothing can."""
        if self._model is not None:
            self._attach(self._model)
            return
        reason = "no call of a module that trains was seen"
        if anything_compiled():
            reason += "; a training step that is compiled as a whole (`@torch.compile`) shows none"
        self._checker.nothing_seen(reason, emit=self._context["emit"], directory=self._context["directory"])

    def _contained(self, hook: Callable[..., None]) -> Callable[..., None]:
        """``hook`` for the process and thread that watch; unable to raise anything but ``FindingsError``."""

        def call(*args: Any) -> None:
            try:
                # What Dynamo traces must be the user's program alone; it also calls modules for their shapes only.
                if torch.compiler.is_dynamo_compiling() or TracingContext.try_get() is not None:
                    return
                if (os.getpid(), threading.get_ident()) == self._place:
                    with torch._C.DisableTorchFunction():
                        self._safely(hook, *args)
            except RecursionError:
                # At the last frame that the recursion limit allows, no module is the outermost.
                return

        return call

    def _listen(self) -> None:
        """Wait for the calls of the model, wherever they come from."""
        self._listening.callback(undo, on_module_calls(self._contained(self._called)))

    def _called(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._fault is not None:
            raise self._fault
        if self._outermost is None:
            if not self._begins_training(module):
                return
            self._outermost = module
            self._attach(module)
        elif self._was_mistaken_for(module):
            self._step = self._outermost = None
            self._checker.start_over()
            self._autocast.waiting = True
            self._autocast.forget()
            self._called(module, args)
            return
        elif module is not self._outermost or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        elif self._step is not None:
            if self._step.inside_model:
                return
            self._forwards += 1
            # A scaler that skips the step, or gradient accumulation, must not keep the probes for long.
            if not self._optimized and self._forwards < _MOST_FORWARDS:
                return
            self._end_step()
        if self._checker.watching:
            step = self._checker.training_step(self._autocast)
            if isinstance(step, WatchedStep):
                self._autocast.waiting = False
                self._optimized, self._forwards = False, 1
                self._step = step.__enter__()
        else:
            self._training.close()
            if not self._checker.watching_evaluation:
                self._evaluation.close()

    def _was_mistaken_for(self, module: nn.Module) -> bool:
        """Whether the open step is not that of the training: what began it was a dry run of ``module``, before there
        was an optimizer, or another model, while an optimizer has stepped that trains ``module``."""
        if self._step is None or self._optimized or self._equipped or not self._begins_training(module):
            return False
        if module is self._outermost:
            return bool(_optimizers_of(module))
        return not self._elsewhere.isdisjoint(map(id, module.parameters()))

    def _begins_training(self, module: nn.Module) -> bool:
        if not module.training or not torch.is_grad_enabled():
            return False
        if self._model is not None:
            return unwrapped(module) is unwrapped(self._model)
        # Older PyTorch leaves modules in compiled code, and the one it calls first is not the outermost.
        if any(frame.f_code.co_filename.startswith("<eval_with_key>") for frame, _ in walk_stack(sys._getframe(1))):
            return False
        return any(parameter.requires_grad for parameter in module.parameters())

    def _attach(self, module: nn.Module) -> None:
        own = {id(parameter) for parameter in module.parameters()}
        optimizers = self._optimizers or _optimizers_of(module)
        self._equipped = any(own & _held(optimizer) for optimizer in optimizers)
        self._elsewhere = set()
        scaler = self._scaler
        if scaler is None and _float16_in_force(module):
            # Float16 is seldom meant without one. Elsewhere one that is alive may be another run's.
            scalers = _alive(torch.amp.GradScaler)
            scaler = next((one for one in scalers if one.is_enabled()), scalers[0] if scalers else None)
        precision = self._precision or self._observed(module, scaler)
        self._shown = precision, scaler
        self._checker.attach(module, precision=precision, optimizers=optimizers, scaler=scaler, **self._context)

    def _take_scaler(self) -> None:
        """The scaler is known by its use, where none was given."""
        scaler = self._step.scaler if self._step is not None else None
        precision, known = self._shown
        if self._scaler is None and scaler is not None and scaler is not known:
            self._shown = precision, scaler
            self._checker.scaled_by(scaler, self._precision or _shown_by(scaler, precision))

    def _observed(self, module: nn.Module, scaler: torch.amp.GradScaler | None) -> Precision:
        """The precision that the loop itself shows at its first training forward."""
        tensor = next(module.parameters(), None)
        if tensor is None or not torch.amp.is_autocast_available(tensor.device.type):
            return Precision()
        device_type, enabled = tensor.device.type, scaler.is_enabled() if scaler is not None else None
        state = autocast_state(device_type)
        entered = [region for region in self._autocast.around if region.requested]
        if state.enabled or entered:
            region = next((r for r in entered if r.enabled == state.enabled), None)
            where = f"the autocast region at {region.site}" if region and region.site else "an autocast region"
            dtype = state.dtype if state.enabled or region is None else region.dtype
            enabled = False if enabled is None and dtype == "float16" else enabled
            return Precision("mixed", device_type, dtype, enabled, where)
        precision = Precision("true", device_type, dtype_name(tensor.dtype), False, explicit=False)
        return precision if scaler is None else _shown_by(scaler, precision)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._fault is not None or (os.getpid(), threading.get_ident()) != self._place:
            return
        try:
            held = _held(optimizer)
            if self._outermost is not None and not held.isdisjoint(map(id, self._outermost.parameters())):
                self._optimized = True
            else:
                self._elsewhere |= held
        except Exception as error:  # noqa: BLE001
            self._fault = bare(error)

    def _end_step(self, exc: BaseException | None = None) -> None:
        self._take_scaler()
        step, self._step = self._step, None
        if step is not None:
            self._autocast.waiting = True
            try:
                step.__exit__(type(exc) if exc else None, exc, None)
            finally:
                self._autocast.forget()

    @property
    def _roots(self) -> tuple[nn.Module, ...]:
        """The module that the loop calls, and the user's own inside its wrappers."""
        return (self._outermost, unwrapped(self._outermost)) if self._outermost is not None else ()

    def _await_evaluation(self) -> None:
        """Wait for ``model.eval()``: no hook could, without a Python call in every batch until then."""
        evaluations = Listening()
        self._evaluation.callback(undo, evaluations.end)
        evaluations.to(nn.Module.eval, before=self._contained(self._eval_called))

    def _is_around_model(self, module: nn.Module) -> bool:
        return any(part is root for part in module.modules() for root in self._roots)

    def _eval_called(self, module: nn.Module) -> None:
        if not self._is_around_model(module):
            return
        if self._step is not None and self._optimized:
            self._end_step()
            if not self._checker.watching:
                self._training.close()
        self._evaluation.close()
        if self._checker.watching_evaluation:
            self._evaluating()

    def _evaluating(self) -> None:
        roots = self._roots
        opened: list[tuple[nn.Module, Any]] = []

        def before(called: nn.Module, args: tuple[Any, ...]) -> None:
            if opened or not any(called is root for root in roots):
                return
            if called.training:
                self._evaluation.close()
                self._await_evaluation()
            else:
                step = self._checker.evaluation_step(autocast=autocast)
                opened.append((called, step))
                if isinstance(step, WatchedStep):
                    step.__enter__()

        def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if opened and called is opened[0][0]:
                step = opened[0][1]
                self._evaluation.close()
                step.__exit__(None, None, None)

        autocast = self._evaluation.enter_context(AutocastProbe())
        self._evaluation.callback(undo, on_module_calls(self._contained(before), self._contained(after)))


_MOST_FORWARDS = 8


def _left_backward(exc: BaseException) -> bool:
    """Whether an exception came out of a backward pass."""
    return any(frame.f_code.co_name == "_engine_run_backward" for frame, _ in walk_tb(exc.__traceback__))


def _float16_in_force(module: nn.Module) -> bool:
    device_type = next((parameter.device.type for parameter in module.parameters()), "cpu")
    if not torch.amp.is_autocast_available(device_type):
        return False
    state = autocast_state(device_type)
    return state.enabled and state.dtype == "float16"


def _shown_by(scaler: torch.amp.GradScaler, precision: Precision) -> Precision:
    """``precision`` of a loop that uses ``scaler``, which is a wish for mixed precision in itself."""
    if not scaler.is_enabled() or precision.mixed:
        return replace(precision, scaler=scaler.is_enabled())
    return Precision("mixed", precision.device_type, None, True, f"an enabled {type(scaler).__name__}")


def _optimizers_of(module: nn.Module) -> list[torch.optim.Optimizer]:
    own = {id(parameter) for parameter in module.parameters()}
    return [optimizer for optimizer in _alive(torch.optim.Optimizer) if own & _held(optimizer)]


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _alive(kind: type[Any]) -> list[Any]:
    """The objects of a class that are alive. ``isinstance`` would run the code of proxies; their type does not lie."""
    return [item for item in gc.get_objects() if issubclass(type(item), kind)]
