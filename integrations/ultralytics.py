"""AmpCheck in Ultralytics: ``AmpCheck().attach(model)`` before ``model.train(...)``, or its ``callbacks``; and

    python -m ampcheck.integrations.ultralytics detect train model=yolo11n.yaml data=coco8.yaml

in place of the ``yolo`` command.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import ultralytics
from ultralytics.cfg import entrypoint
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, dist, torch_utils

from ampcheck import AmpChecker, FindingsError, Host, Precision, compare
from ampcheck.integrations.fixes.ultralytics import FIXES

__all__ = ["FIXES", "AmpCheck"]

Run = TypeVar("Run")
Callback = Callable[[Any], None]


_HANDS_ON_CALLBACKS = "callbacks" in dist.generate_ddp_file.__code__.co_names

P = ParamSpec("P")


def _contained(callback: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Make a method unable to end training by a fault of AmpCheck's own, such as an attribute that a version of
    Ultralytics lacks."""

    @functools.wraps(callback)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(self, *args, **kwargs)
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not the user's
            self._checker.switch_off(error)

    return call


class AmpCheck:
    """Checks the training runs of a YOLO model.

    ``attach(model)`` sees everything. ``callbacks``, a mapping from event to function for ``model.add_callback``,
    sees all but failures of ``model.val()``, and whether ``amp=`` was given or left at its default.

    Training on several devices is checked in the processes that Ultralytics starts for it, where the version hands
    its callbacks on to them; where not, ``attach`` says so.

    Reports go to Ultralytics' logger, and as ``ampcheck.json`` into the run's ``save_dir``. The first batches of
    training and of validation are watched; after that nothing of AmpCheck runs in a batch.

    ``select`` and ``ignore`` take rule codes or prefixes (``"AMP2"``). ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) stops training on a finding that severe. ``watch_steps`` is the number of training batches to watch.
    ``report`` is the path of the JSON report, or false for none. ``checker`` replaces all of these.

    ``compare_export=True`` looks at ``model.export(...)`` too: the TorchScript or ONNX file that it wrote is compared
    with the model that the exporter wrote it from, module by module, and what is found is reported, with a JSON report
    beside the file. ``fail_on`` holds there too.

    Raises ``ValueError`` for an unknown code or option value, and for options given beside ``checker``.
    """

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: str = "never",
        watch_steps: int = 1,
        report: bool | str | os.PathLike[str] = True,
        compare_export: bool = False,
        checker: AmpChecker | None = None,
    ) -> None:
        options: dict[str, Any] = {"select": select, "ignore": ignore, "fail_on": fail_on}
        options |= {"watch_steps": watch_steps, "report": report}
        defaults = AmpCheck.__init__.__kwdefaults__ or {}
        given = [name for name, value in options.items() if value != defaults[name]]
        if checker is not None and given:
            raise ValueError(f"AmpCheck takes {', '.join(given)} or a checker, not both")
        self._checker = checker or AmpChecker(**options)
        options = self._checker.options
        self._judging = {name: options[name] for name in ("select", "ignore", "fail_on")}
        self._writes = options["report"] is not False
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
            method = getattr(run, name, None)
            if method is not None:
                # Not a closure: a copy of the model must train the copy.
                setattr(run, name, functools.update_wrapper(functools.partial(guard, run, method), method))
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

    @_contained
    def _say_if_elsewhere(self) -> None:
        if not self._started and not _HANDS_ON_CALLBACKS:
            LOGGER.warning(
                f"AmpCheck: nothing was watched: Ultralytics {ultralytics.__version__} trains on several devices in "
                "processes that it starts anew, and hands them no callbacks. Started with `torchrun --nproc-per-node "
                "N`, with the same `device=`, this program trains in watched processes."
            )

    def _val(self, run: Any, val: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._fit is not None or not isinstance(run.model, torch.nn.Module):
            return val(*args, **kwargs)

        def begin(validator: Any) -> None:
            self._attach(run.model, directory=getattr(validator, "save_dir", None))

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

    @_contained
    def _attach(self, model: torch.nn.Module, /, **seen: Any) -> None:
        host = Host("ultralytics", ultralytics.__version__, FIXES)
        self._checker.attach(model, host=host, emit=self._say, **seen)

    def _say(self, text: str) -> None:
        # Progress bars leave the cursor in the middle of a line.
        LOGGER.info(f"\n{text}" if self._fit is not None and self._fit.ends_line() else text)

    @_contained
    def _fit_start(self, trainer: Any) -> None:
        self._started = True
        ema = getattr(trainer, "ema", None)
        optimizer = getattr(trainer, "optimizer", None)
        self._attach(
            trainer.model,
            precision=_declared(trainer, self._amp_given),
            optimizers=[] if optimizer is None else [optimizer],
            scaler=getattr(trainer, "scaler", None),
            averaged=getattr(ema, "ema", None),
            directory=getattr(trainer, "save_dir", None),
        )
        if self._guarded or _tears_down_after_failure(trainer):
            self._fit = _Fit(self._checker, trainer)
        else:
            LOGGER.warning(
                f"AmpCheck: Ultralytics {ultralytics.__version__} runs no callback after a failure, so that no step "
                "is watched; `AmpCheck().attach(model)` in place of its callbacks watches them."
            )

    @_contained
    def _teardown(self, trainer: Any) -> None:
        fit = self._fit
        self._end(fit.failure(sys.exc_info()[1]) if fit else None, "training_step")

    def _export_end(self, exporter: Any) -> None:
        try:
            file, model, images = _exported(exporter)
            if file is None:
                return
            dynamic = None if getattr(exporter.args, "dynamic", False) else False
            reached = None
            try:
                # The exporter has just written it.
                report = compare(model, file, images, dynamic_batch=dynamic, trusted=True, **self._judging)
            except FindingsError as error:
                reached, report = error, error.report
            LOGGER.info(f"\n{report}")
            if self._writes:
                report.write(f"{file}.ampcheck.json")
        except Exception as error:  # noqa: BLE001 - the file is written, and good or bad without us
            LOGGER.warning(f"AmpCheck (AMP900): the export was not compared: {type(error).__name__}: {error}")
            return
        if reached is not None:
            raise reached

    @_contained
    def _end(self, error: BaseException | None, phase: str) -> None:
        fit, self._fit = self._fit, None
        if error is not None:
            batch = None
            if fit is not None:
                phase = fit.phase
                # What the frames alone tell is worth more than nothing.
                with suppress(Exception):
                    batch = fit.failing_batch(frame for frame, _ in traceback.walk_tb(error.__traceback__))
            self._checker.diagnose(error, phase=phase, batch=batch)
        if fit is not None:
            fit.close()
        self._checker.detach()


class _Fit:
    """One training run: its trainer, and the watched batch that is open.

    The callbacks of a batch are taken back as soon as nothing is left to watch. Lists of callbacks are replaced and
    not edited, because Ultralytics is iterating over them.
    """

    def __init__(self, checker: AmpChecker, trainer: Any) -> None:
        self.phase = "training_step"
        self._checker = checker
        self._trainer = trainer
        self._handled = sys.exc_info()[1]
        self._open: AbstractContextManager[object] | None = None
        self._in_line = False
        self._training = {"on_train_batch_start": self._train_batch_start, "on_train_batch_end": self._batch_end}
        self._evaluation = {"on_val_batch_start": self._val_batch_start, "on_val_batch_end": self._batch_end}
        self._epochs = {"on_train_epoch_start": self._epoch_start, "on_train_epoch_end": self._epoch_end}
        for events in (self._training, self._evaluation, self._epochs):
            self._add(events)

    def failure(self, error: BaseException | None) -> BaseException | None:
        """``error`` unless it was in flight before training began: somebody trains in an ``except`` block."""
        return None if error is self._handled else error

    def failing_batch(self, frames: Iterable[FrameType]) -> Callable[[], object] | None:
        """Computes the loss of the batch in these frames as the trainer does; ``None`` where no training batch is."""
        found = {frame.f_code.co_name: frame for frame in frames}
        names = found.keys()
        if self.phase != "training_step" or "_do_train" not in names:
            return None
        batch = found["_do_train"].f_locals.get("batch")
        if not isinstance(batch, dict):
            return None
        return functools.partial(_loss, self._trainer, batch, raw="preprocess_batch" in names)

    def ends_line(self) -> bool:
        """Whether this is the first message since a batch was entered."""
        in_line, self._in_line = self._in_line, False
        return in_line

    def close(self) -> None:
        """Take all callbacks back."""
        for events in (self._training, self._evaluation, self._epochs):
            self._remove(events)

    def _add(self, events: Mapping[str, Callback]) -> None:
        callbacks = self._trainer.callbacks
        for event, function in events.items():
            callbacks[event] = [*callbacks.get(event, ()), function]

    def _remove(self, events: Mapping[str, Callback]) -> None:
        callbacks = self._trainer.callbacks
        for event, function in events.items():
            callbacks[event] = [other for other in callbacks.get(event, ()) if other != function]

    def _enter(self, step: AbstractContextManager[object]) -> None:
        step.__enter__()
        self._open, self._in_line = step, True

    def _leave(self, error: BaseException | None = None) -> None:
        step, self._open = self._open, None
        if step is not None:
            step.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    @_contained
    def _epoch_start(self, trainer: Any) -> None:
        self.phase = "training_step"

    @_contained
    def _epoch_end(self, trainer: Any) -> None:
        self._leave()
        self.phase = "evaluation_step"

    @_contained
    def _train_batch_start(self, trainer: Any) -> None:
        # A batch that ran out of memory is tried again with fewer images, and its end was never reached.
        self._leave(GeneratorExit())
        self._enter(self._checker.training_step(batch=self.failing_batch))

    @_contained
    def _val_batch_start(self, validator: Any) -> None:
        # The evaluation after the last epoch is of a checkpoint, not of the model that trains.
        if validator.training:
            ema = getattr(self._trainer, "ema", None)
            self._enter(self._checker.evaluation_step(getattr(ema, "ema", None)))

    @_contained
    def _batch_end(self, _: Any) -> None:
        self._leave()
        if not self._checker.watching:
            self._remove(self._training)
        if not self._checker.watching_evaluation:
            self._remove(self._evaluation)


def _loss(trainer: Any, batch: Mapping[str, Any], raw: bool) -> object:
    """The loss of a batch as `BaseTrainer._do_train` computes it; ``raw``: the batch is still to be preprocessed."""
    unwrap = getattr(torch_utils, "unwrap_model", None) or getattr(torch_utils, "de_parallel")  # noqa: B009
    dtype = torch.bfloat16 if trainer.args.amp == "bf16" else None
    with torch.autocast(trainer.device.type, dtype, enabled=bool(trainer.amp)):
        batch = dict(batch)
        return unwrap(trainer.model)(trainer.preprocess_batch(batch) if raw else batch)[0].sum()


def _exported(exporter: Any) -> tuple[Path | None, torch.nn.Module, torch.Tensor]:
    """The file that an exporter wrote (``None``: one that is not to be compared), the model that is in it, which is
    the exporter's own copy, fused and with its head in export mode, and the images it was traced with."""
    model, images, args = exporter.model, exporter.im, exporter.args
    suffix = {"torchscript": ".torchscript", "onnx": ".onnx"}.get(str(args.format).lower())
    if suffix is None:
        return None, model, images
    if getattr(args, "quantize", None) not in (None, 16, 32):
        LOGGER.info("AmpCheck: an export to integers computes something else on purpose, and is not compared.")
        return None, model, images
    if getattr(args, "nms", False):
        from ultralytics.engine import exporter as engine

        # Older versions have suppression in CoreML files alone.
        wrapper: Any = getattr(engine, "NMSModel", None)
        model = model if wrapper is None else wrapper(model, args).eval()
    return exporter.file.with_suffix(suffix), model, images


def _declared(trainer: Any, given: bool) -> Precision:
    """What ``amp=`` asks for. ``True`` is torch's default dtype for an accelerator, and names none for a CPU, where
    Ultralytics has no AMP. Validation is in that default whatever the dtype of training."""
    asked = getattr(trainer.args, "amp", None)
    device_type = trainer.device.type
    if asked is None:
        return Precision(device_type=device_type)
    accelerated = device_type != "cpu" and torch.amp.is_autocast_available(device_type)
    default = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.") if accelerated else None
    dtype = {"fp32": "float32", False: "float32", "fp16": "float16", "bf16": "bfloat16", True: default}.get(asked)
    explicit = given or asked != DEFAULT_CFG_DICT.get("amp")
    return Precision(
        mode="true" if dtype == "float32" else "mixed",
        device_type=device_type,
        dtype=dtype,
        scaler=dtype == "float16" if dtype else None,
        source=f"amp={asked!r}" if explicit else f"Ultralytics' default amp={asked!r}",
        evaluation_dtype=default if getattr(trainer, "amp", False) and default else "float32",
        explicit=explicit,
    )


def _tears_down_after_failure(trainer: Any) -> bool:
    """Whether `train` itself runs the ``teardown`` event, in a ``finally``; older versions do so where training ends
    well."""
    trains = (vars(cls).get("train") for cls in type(trainer).__mro__)
    return any("teardown" in getattr(getattr(train, "__code__", None), "co_consts", ()) for train in trains)


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``yolo`` command with every model that it makes checked. Options of AmpCheck come before its arguments.

    Exits with status 3 where a finding reaches ``--fail-on``, and 2 for bad options.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ampcheck.integrations.ultralytics", add_help=False, allow_abbrev=False
    )
    for option in ("--select", "--ignore"):
        parser.add_argument(option, default=(), metavar="CODES")
    parser.add_argument("--fail-on", default="never")
    parser.add_argument("--watch-steps", default=1, type=int, metavar="N")
    parser.add_argument("--report", default=True, metavar="FILE")
    parser.add_argument("--compare-export", action="store_true")
    options, rest = parser.parse_known_args(arguments)
    try:
        check = AmpCheck(**vars(options))
    except ValueError as error:
        parser.error(str(error))

    model: Any = Model
    make = model.__init__

    @functools.wraps(make)
    def make_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        check.attach(self)

    # The command makes its model and trains it in one call.
    model.__init__ = make_checked
    sys.argv[1:] = rest
    try:
        entrypoint()
    except FindingsError as error:
        parser.exit(3, f"ampcheck: {error}\n")
    finally:
        model.__init__ = make


if __name__ == "__main__":
    # Training on several GPUs pickles the callbacks, and `__main__` is another module there.
    from ampcheck.integrations.ultralytics import main as checked_yolo

    checked_yolo()
