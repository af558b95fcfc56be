"""AmpCheck around timm's train script, unmodified:

    python -m ampcheck.integrations.timm [--json FILE] [--fail-on error] train.py --amp --amp-dtype bfloat16 ...
    torchrun --nproc-per-node 2 -m ampcheck.integrations.timm train.py ...

or, in a fork of it, one line before its last: ``ampcheck.integrations.timm.install()``.
"""

from __future__ import annotations

import atexit
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from types import ModuleType, TracebackType
from typing import Any

import timm
import torch
from torch import nn

from ampcheck import AmpChecker, Host, Session, Shadow, contained, shadow
from ampcheck.integrations.fixes.timm import FIXES
from ampcheck.integrations.readers import timm as reader

__all__ = ["FIXES", "install"]

_LOGGER = logging.getLogger("train")


def install(
    script: ModuleType | None = None,
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    fail_on: str = "never",
    watch_steps: int = 1,
    report: bool | str | os.PathLike[str] = True,
    exports: bool = True,
    numerics: str = "free",
    checker: AmpChecker | None = None,
) -> AmpChecker:
    """Check the training that ``script`` (default: the running program) does in its functions ``train_one_epoch`` and
    ``validate``. Call it once both are defined, before they are used.

    Reports go to the script's logger, ``train``, and as ``ampcheck.json`` into its output directory.

    ``select`` and ``ignore`` take rule codes or prefixes (``"AMP2"``). ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) stops training on a finding that severe. ``watch_steps`` is the number of updates to watch. ``report``
    is the path of the JSON report, or false for none.
    ``numerics`` says how to look for losses, gradients and weights that are not finite: ``"free"`` where training stops
    anyway, ``"guard"`` also once a step, ``"stop"`` before the optimizer's step, raising ``FloatingPointError``, or
    ``"off"``. ``exports=False`` leaves exports in the run alone. ``checker`` replaces all of these.

    Raises ``ValueError`` for an unknown code or option value, and for options passed together with ``checker``.
    """
    session = Session(
        checker,
        select=select,
        ignore=ignore,
        fail_on=fail_on,
        watch_steps=watch_steps,
        report=report,
        exports=exports,
        numerics=numerics,
    )
    script = script or sys.modules["__main__"]
    if not wrap(script, session):
        say(f"ampcheck  {script.__name__} defines no train_one_epoch() yet, so it is not checked")
    atexit.register(session.checker.detach)
    return session.checker


def wrap(script: ModuleType, session: Session) -> bool:
    """Wrap the script's functions by name. Returns false, and does nothing, if none of them trains."""
    if not callable(getattr(script, "train_one_epoch", None)):
        return False
    adapter = _Script(session)
    for name, around in (("train_one_epoch", adapter.train), ("validate", adapter.validate)):
        if callable(getattr(script, name, None)):
            shadow(script, name, around)
    return True


class _Script:
    """The two functions of a train script, with the checker around each call."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.session.warn = say
        self._trains = False

    def train(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        updates = self._updates(function, args, kwargs)
        try:
            with updates or nullcontext():
                metrics = function(*args, **kwargs)
            self._looks(function, args, kwargs, metrics)
            return metrics
        except Exception as error:
            self.session.diagnose(error, find_batch=reader.failing_batch)
            raise

    def validate(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        forward = self._first_forward(function, args, kwargs)
        try:
            with forward or nullcontext():
                return function(*args, **kwargs)
        except Exception as error:
            self.session.diagnose(error, phase="evaluation_step")
            raise

    @contained
    def _updates(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Updates:
        values = reader.arguments(function, args, kwargs)
        if not self._trains:
            self._trains = True
            self._attach(values)
        return _Updates(self.session, reader.optimizer(values))

    @contained
    def _first_forward(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _FirstForward:
        values = reader.arguments(function, args, kwargs)
        if not self._trains and self.session.checker.report is None:
            self._attach(values)
        return _FirstForward(self.session, reader.model(values))

    @contained
    def _looks(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], metrics: Any) -> None:
        epoch = reader.arguments(function, args, kwargs).get("epoch")
        loss = metrics.get("loss") if isinstance(metrics, Mapping) else None
        moment = f"at the end of epoch {epoch}" if isinstance(epoch, int) else "at the end of an epoch"
        self.session.look(moment, loss=float(loss) if isinstance(loss, (int, float)) else None)

    def _attach(self, values: Mapping[str, Any]) -> None:
        model = reader.model(values)
        if model is None:
            say("ampcheck  the script's functions get no model, so nothing is checked")
            return
        host = Host("timm", timm.__version__, FIXES)
        # The script counts no steps of the optimizer.
        first_step = None if values.get("epoch") else 0
        self.session.attach(model, host=host, log=log, first_step=first_step, **reader.held(values, model))


class _Updates:
    """Watches updates, each from the end of the previous one, while the checker has steps left to watch.

    timm's scripts have no event between two batches, so this shadows two methods of the optimizer until it is done. An
    update ends when ``step`` returns, or when ``zero_grad`` finds gradients: then the scaler skipped it.
    """

    def __init__(self, session: Session, optimizer: torch.optim.Optimizer | None) -> None:
        self.session = session
        self._optimizer = optimizer
        self._shadows: list[Shadow] = []

    @contained
    def __enter__(self) -> None:
        if self.session.checker.watching:
            if self._optimizer is not None:
                self._shadows = [
                    self.session.shadow(self._optimizer, "step", self._around_step),
                    self.session.shadow(self._optimizer, "zero_grad", self._around_zero_grad),
                ]
            self._open()

    @contained
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.session.take_back(*self._shadows)
        self.session.close_step(exc)

    def _open(self) -> None:
        self.session.open_step(self.session.checker.training_step(batch=reader.failing_batch))

    def _around_step(self, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        self._updated()
        return result

    def _around_zero_grad(self, zero_grad: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        skipped = self._has_gradients()
        result = zero_grad(*args, **kwargs)
        if skipped:
            self._updated()
        return result

    @contained
    def _updated(self) -> None:
        self.session.close_step()
        if self.session.checker.watching:
            self._open()
        else:
            self.session.take_back(*self._shadows)

    @contained
    def _has_gradients(self) -> bool:
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return any(parameter.grad is not None for group in groups for parameter in group["params"])


class _FirstForward:
    """Watches evaluation until the first call of ``model`` has returned."""

    def __init__(self, session: Session, model: nn.Module | None) -> None:
        self.session = session
        self._model = model
        self._open = ExitStack()

    @contained
    def __enter__(self) -> None:
        checker = self.session.checker
        scripted = isinstance(self._model, torch.jit.ScriptModule)  # takes no hooks
        if self._model is not None and not scripted and checker.watching_evaluation:
            self.session.put(self)
            self._open.callback(self._model.register_forward_hook(_Returned(self)).remove)
            self._open.enter_context(checker.evaluation_step(self._model))

    @contained
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(exc_type, exc, traceback)
        self.session.take_back(self)

    @contained
    def returned(self) -> None:
        self.session.take_back(self)

    def give_back(self) -> None:
        self._open.close()


class _Returned:
    """The hook as the module holds it: a copy or a pickle of the module gets one that does nothing."""

    def __init__(self, watch: _FirstForward) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._watch.returned()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def say(text: str) -> None:
    log(logging.INFO, text)


def log(level: int, text: str) -> None:
    """Log to the script's logger or, if it has no handler, to standard error."""
    heard = _LOGGER.hasHandlers() and _LOGGER.isEnabledFor(level)
    _LOGGER.log(level if heard else max(level, logging.WARNING), text)


if __name__ == "__main__":
    runpy.run_module("ampcheck.integrations.commands.timm", run_name="__main__")
