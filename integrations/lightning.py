"""AmpCheck as a Lightning callback, for the packages ``lightning`` and ``pytorch_lightning`` alike."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from ampcheck import AmpChecker, Host, Session, contained
from ampcheck.integrations.fixes.lightning import FIXES, MANUAL_OPTIMIZATION
from ampcheck.integrations.readers import lightning as reader

__all__ = ["FIXES", "AmpCheck"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

# By stage: the loops, and what evaluates one batch.
_STAGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "fit": (("fit_loop.run", "fit_loop.epoch_loop.val_loop.run"), "strategy.validation_step"),
    "validate": (("validate_loop.run",), "strategy.validation_step"),
    "test": (("test_loop.run",), "strategy.test_step"),
    "predict": (("predict_loop.run",), "strategy.predict_step"),
}
_TRAINING_STEPS = tuple(f"fit_loop.epoch_loop.{kind}_optimization.run" for kind in ("automatic", "manual"))


def _imported() -> list[ModuleType]:
    return [package for name in _PACKAGES if (package := sys.modules.get(name)) is not None]


def _callback_type() -> type:
    """``Callback`` of the Lightning packages imported so far, else of those installed.

    Each package's ``Trainer`` takes a lone callback (no list) and the command line takes one only if it derives from
    the package's own class, so with both packages in use the callback derives from both.
    """
    packages = _imported()
    if not packages:
        for name in _PACKAGES:
            try:
                packages.append(importlib.import_module(name))
            except ImportError:
                continue
    if not packages:
        raise ImportError("AmpCheck for Lightning can import neither `lightning` nor `pytorch_lightning`")
    bases = tuple(package.Callback for package in packages)
    return bases[0] if len(bases) == 1 else type("Callback", bases, {})


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _callback_type()


class AmpCheck(Callback):
    """Reports at fit start and after the first steps whether mixed precision is on and sound, and explains crashes.

    ``Trainer(callbacks=[AmpCheck()], ...)``. The report goes to Lightning's logger on rank zero, and as
    ``ampcheck.json`` into ``trainer.log_dir`` (none under ``fast_dev_run``).

    Args:
        select: Rule codes or prefixes to judge (``"AMP2"``, or several); empty for all.
        ignore: Rule codes or prefixes to leave out.
        fail_on: ``"error"`` or ``"warning"`` stops the run with ``FindingsError`` at such a finding.
        watch_steps: How many training steps to watch.
        report: Where the JSON goes: true for the run's directory, a path, or false for nowhere.
        exports: Whether exports in the run (`to_torchscript`, `to_onnx`) are compared with the module.
        numerics: Looks for losses, gradients and weights that are not finite: ``"free"`` where training stops anyway,
            ``"guard"`` also once a step, ``"stop"`` before the optimizer's step, raising ``FloatingPointError``,
            ``"off"`` not at all.
        checker: A checker of your own, in place of all the options above.

    Raises:
        ValueError: On an unknown rule code or option value, or if ``checker`` comes with other options.
    """

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: Literal["error", "warning", "never"] = "never",
        watch_steps: int = 1,
        report: bool | str | os.PathLike[str] = True,
        exports: bool = True,
        numerics: Literal["off", "free", "guard", "stop"] = "free",
        checker: AmpChecker | None = None,
    ) -> None:
        super().__init__()
        self._logger = logging.getLogger(_PACKAGES[0])
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
        self.session.warn = self._logger.warning
        self.checker = self.session.checker
        self._fitted = False
        self._first_step = 0
        self._looked_at = -1

    @contained
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._logger = logging.getLogger(_package_of(trainer).__name__)
        self.session.warn = self._logger.warning
        loops, evaluation_step = _STAGES[stage]
        for method in self._methods(trainer, *loops):
            # Spawned and forked processes call no `on_exception`: only their parent does, with a copy of the text.
            self.session.guard(*method, functools.partial(self._failed, trainer))
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            if trainer.is_global_zero:
                self._logger.info("ampcheck  the module is compiled as a whole: its steps are not watched")
            return
        if stage == "fit":
            for method in self._methods(trainer, *_TRAINING_STEPS):
                self.session.watch_training(*method, functools.partial(reader.failing_batch, trainer, _imported()))
        for method in self._methods(trainer, evaluation_step):
            self.session.watch_evaluation(*method)

    @contained
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @contained
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between the two, checkpoints are restored and the module's own `on_fit_start` has run.
        self._attach(trainer)

    @contained
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._attach(trainer)
        elif not trainer.sanity_checking:
            self._look(trainer, f"before the validation of epoch {trainer.current_epoch}")

    @contained
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, f"at the end of epoch {trainer.current_epoch}", reader.logged_loss(trainer))

    @contained
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer, f"in the checkpoint of step {trainer.global_step}")

    @contained
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, "at the end of the training")

    @contained
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @contained
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @contained
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._failed(trainer, exception)

    @contained
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.session.end()

    def _methods(self, trainer: Trainer, *paths: str) -> Iterator[tuple[Any, str]]:
        """The object and the name of its method for each path from the trainer, if this Lightning has them."""
        for path in paths:
            *parents, name = path.split(".")
            owner: Any = trainer
            for parent in parents:
                owner = getattr(owner, parent, None)
            if hasattr(owner, name):
                yield owner, name
            else:
                self._logger.warning("ampcheck  this Lightning has no `trainer.%s`: it is not watched", path)

    def _attach(self, trainer: Trainer) -> None:
        package = _package_of(trainer)
        # A test that follows a fit must not write over the fit's report.
        self._fitted = self._fitted or trainer.state.fn == "fit"
        directory = _directory(trainer) if trainer.state.fn == "fit" or not self._fitted else None
        manual = {} if trainer.lightning_module.automatic_optimization else MANUAL_OPTIMIZATION
        self._first_step, self._looked_at = trainer.global_step, -1
        host = Host("lightning", package.__version__, {**FIXES, **manual})
        held = reader.held(trainer, package)
        self.session.attach(
            trainer.lightning_module,
            host=host,
            log=self._logger.log,
            directory=directory,
            first_step=self._first_step,
            **held,
        )

    def _look(self, trainer: Trainer, moment: str, loss: float | None = None) -> None:
        """Look at the numbers, if there was a step since the last look."""
        step = trainer.global_step
        if loss is None and step == self._looked_at:
            return
        self._looked_at = step
        steps = step - self._first_step if len(trainer.optimizers) == 1 else None
        self.session.look(moment, steps=steps, loss=loss)

    @contained
    def _failed(self, trainer: Trainer, error: BaseException) -> None:
        training = getattr(trainer.state.stage, "value", None) == "train"
        self.session.diagnose(
            error,
            phase="training_step" if training else "evaluation_step",
            step=trainer.global_step,
            find_batch=functools.partial(reader.failing_batch, trainer, _imported()) if training else None,
        )
        self.session.end()


def _package_of(trainer: Trainer) -> ModuleType:
    """The Lightning package whose trainer this is."""
    packages = _imported()
    return next((package for package in packages if isinstance(trainer, package.Trainer)), packages[0])


def _directory(trainer: Any) -> str | None:
    """Where the run's files go; ``None`` if it writes none, or not to a disk. Call it on every rank."""
    directory = trainer.log_dir or trainer.default_root_dir
    return None if trainer.fast_dev_run or "://" in directory else directory
