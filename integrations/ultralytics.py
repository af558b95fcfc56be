"""AmpCheck in Ultralytics: ``AmpCheck().attach(model)`` before ``model.train(...)``, or its ``callbacks``; and in
place of the ``yolo`` command

    python -m ampcheck.integrations.ultralytics detect train model=yolo11n.yaml data=coco8.yaml
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import ultralytics
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import LOGGER

from ampcheck import AmpChecker, Host, Session, contained, shadow
from ampcheck.integrations.exports.ultralytics import report_export
from ampcheck.integrations.fixes.ultralytics import FIXES
from ampcheck.integrations.readers import ultralytics as reader

__all__ = ["FIXES", "AmpCheck"]

Run = TypeVar("Run")
Callback = Callable[[Any], None]


class AmpCheck:
    """Checks the training runs of a YOLO model.

    ``attach(model)`` sees everything. ``callbacks``, a mapping from event to function for ``model.add_callback``, does
    not see failures of ``model.val()``, nor whether ``amp=`` was set or left at its default.

    Training on several devices is checked in the processes that Ultralytics starts, if this version passes its
    callbacks on to them; otherwise ``attach`` says so.

    Reports go to Ultralytics' logger, and as ``ampcheck.json`` into the run's ``save_dir``. AmpCheck watches the first
    batches of training and of validation; after that nothing of it runs in a batch.

    ``select`` and ``ignore`` take rule codes or prefixes (``"AMP2"``). ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) stops training on a finding that severe. ``watch_steps`` is the number of training batches to watch.
    ``report`` is the path of the JSON report, or false for none.
    ``numerics`` says how to look for losses, gradients and weights that are not finite: ``"free"`` where training stops
    anyway, ``"guard"`` also once a step, ``"stop"`` before the optimizer's step, raising ``FloatingPointError``, or
    ``"off"``. ``exports=False`` leaves exports in the run alone. ``checker`` replaces all of these.

    ``compare_export=True`` checks ``model.export(...)`` too: it compares the TorchScript or ONNX file with the model
    that the exporter wrote it from, module by module, and reports the findings, with a JSON report next to the file.
    ``fail_on`` applies there too.

    Raises ``ValueError`` for an unknown code or option value, and for options passed together with ``checker``.
    """

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: str = "never",
        watch_steps: int = 1,
        report: bool | str | os.PathLike[str] = True,
        exports: bool = True,
        numerics: str = "free",
        compare_export: bool = False,
        checker: AmpChecker | None = None,
    ) -> None:
        self.session = Session(
            checker,
            select=select,
            ignore=ignore,
            fail_on=fail_on,
            watch_steps=watch_steps,
            report=report,
            exports=exports,
            numerics=numerics,
        )
        self.session.warn = LOGGER.warning
        self._compare_export = compare_export
        self._amp_given = False
        self._guarded = False
        self._started = False
        self._fit: _Fit | None = None

    @property
    def callbacks(self) -> dict[str, Callback]:
        """``for event, function in AmpCheck().callbacks.items(): model.add_callback(event, function)``"""
        callbacks: dict[str, Callback] = {"on_pretrain_routine_end": self._fit_start, "teardown": self._teardown}
        return callbacks | ({"on_export_end": self._export_end} if self._compare_export else {})

    def attach(self, run: Run) -> Run:
        """Check what ``run``, a YOLO model or a trainer, trains; returns ``run``.

        Adds the callbacks and guards ``train`` and ``val`` of this one object. Raises ``TypeError`` for another object.
        """
        if not isinstance(run, (Model, BaseTrainer)):
            raise TypeError(f"AmpCheck.attach takes a YOLO model or an Ultralytics trainer, not {type(run).__name__}")
        for event, function in self.callbacks.items():
            if function in run.callbacks[event]:
                return run
            run.add_callback(event, function)
        for name, guard in (("train", self._train), ("val", self._val)):
            if hasattr(run, name):
                shadow(run, name, guard, run)
        return run

    def _train(self, run: Any, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._amp_given = "amp" in kwargs
        self._started = False
        try:
            with self._guard("training_step"):
                trained = train(*args, **kwargs)
        except subprocess.CalledProcessError:
            self._say_if_elsewhere()
            raise
        self._say_if_elsewhere()
        return trained

    @contained
    def _say_if_elsewhere(self) -> None:
        if not self._started and not reader.HANDS_ON_CALLBACKS:
            LOGGER.warning(reader.NOTHING_WATCHED)

    def _val(self, run: Any, val: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._fit is not None or not isinstance(run.model, torch.nn.Module):
            return val(*args, **kwargs)
        begin = functools.partial(self._val_start, run.model)
        callbacks = run.callbacks
        callbacks["on_val_start"] = [*callbacks["on_val_start"], begin]
        try:
            with self._guard("evaluation_step"):
                return val(*args, **kwargs)
        finally:
            callbacks["on_val_start"] = [other for other in callbacks["on_val_start"] if other is not begin]

    @contextmanager
    def _guard(self, phase: str) -> Iterator[None]:
        guarded, self._guarded = self._guarded, True
        try:
            yield
        except BaseException as error:
            self._end(error, phase)
            raise
        finally:
            self._guarded = guarded
            self._end(None, phase)

    def _attach(self, model: torch.nn.Module, **seen: Any) -> None:
        self.session.attach(model, host=Host("ultralytics", ultralytics.__version__, FIXES), log=self._log, **seen)

    def _log(self, level: int, text: str) -> None:
        # Progress bars leave the cursor in the middle of a line.
        LOGGER.log(level, f"\n{text}" if self._fit is not None and self._fit.ends_line() else text)

    @contained
    def _fit_start(self, trainer: Any) -> None:
        self._started = True
        # Ultralytics counts no steps of the optimizer.
        first_step = None if getattr(trainer, "start_epoch", 0) else 0
        self._attach(trainer.model, first_step=first_step, **reader.held(trainer, self._amp_given))
        if self._guarded or reader.tears_down_after_failure(trainer):
            self._fit = _Fit(self.session, trainer)
        else:
            LOGGER.warning(reader.NO_STEP_WATCHED)

    @contained
    def _teardown(self, trainer: Any) -> None:
        error = sys.exc_info()[1]
        # An exception already in flight before is no failure: somebody trains in an `except` block.
        self._end(error if self._fit is not None and error is not self._fit.handled else None, "training_step")

    @contained
    def _val_start(self, model: torch.nn.Module, validator: Any) -> None:
        self._attach(model, directory=getattr(validator, "save_dir", None))

    def _export_end(self, exporter: Any) -> None:
        report_export(exporter, **self.session.checker.options)

    @contained
    def _end(self, error: BaseException | None, phase: str) -> None:
        fit, self._fit = self._fit, None
        if error is not None:
            phase, find_batch = (fit.phase, fit.find_batch) if fit is not None else (phase, None)
            self.session.diagnose(error, phase=phase, find_batch=find_batch)
        self.session.end()


class _Fit:
    """One training run. It takes back the callbacks of a batch as soon as nothing is left to watch, and replaces lists
    of callbacks instead of editing them, because Ultralytics iterates over them."""

    def __init__(self, session: Session, trainer: Any) -> None:
        self.session = session
        self.phase = "training_step"
        self.handled = sys.exc_info()[1]
        self._trainer = trainer
        self._in_line = False
        session.put(self)
        for event, function in self._callbacks():
            trainer.callbacks[event] = [*trainer.callbacks.get(event, ()), function]

    def _callbacks(self, beginning: str = "on_") -> list[tuple[str, Callback]]:
        return [(name, getattr(self, name)) for name in dir(self) if name.startswith(beginning)]

    def give_back(self, beginning: str = "on_") -> None:
        callbacks = self._trainer.callbacks
        for event, function in self._callbacks(beginning):
            callbacks[event] = [other for other in callbacks.get(event, ()) if other != function]

    def find_batch(self, frames: Iterable[FrameType]) -> Callable[[], object] | None:
        return reader.failing_batch(self._trainer, frames) if self.phase == "training_step" else None

    def ends_line(self) -> bool:
        """Whether this is the first message since a batch was entered."""
        in_line, self._in_line = self._in_line, False
        return in_line

    @contained
    def on_train_epoch_start(self, trainer: Any) -> None:
        self.phase = "training_step"

    @contained
    def on_train_epoch_end(self, trainer: Any) -> None:
        self.session.close_step()
        self.phase = "evaluation_step"
        self.session.look(f"at the end of epoch {trainer.epoch + 1}", loss=reader.epoch_loss(trainer))

    @contained
    def on_train_batch_start(self, trainer: Any) -> None:
        # Ultralytics retries a batch that ran out of memory with fewer images; its end was never reached.
        self.session.close_step(GeneratorExit())
        self._in_line = True
        self.session.open_step(self.session.checker.training_step(batch=self.find_batch))

    @contained
    def on_val_batch_start(self, validator: Any) -> None:
        # After the last epoch Ultralytics evaluates a checkpoint, not the model that trains.
        if validator.training:
            self._in_line = True
            ema = getattr(self._trainer, "ema", None)
            self.session.open_step(self.session.checker.evaluation_step(getattr(ema, "ema", None)))

    @contained
    def on_train_batch_end(self, _: Any) -> None:
        self.session.close_step()
        if not self.session.checker.watching:
            self.give_back("on_train_batch")
        if not self.session.checker.watching_evaluation:
            self.give_back("on_val_batch")

    on_val_batch_end = on_train_batch_end


if __name__ == "__main__":
    runpy.run_module("ampcheck.integrations.commands.ultralytics", run_name="__main__")
