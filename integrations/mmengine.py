"""AmpCheck for MMEngine and the libraries built on it: MMDetection 3 and its family.

In a config file::

    custom_imports = dict(imports=["ampcheck.integrations.mmengine"])
    custom_hooks = [dict(type="AmpCheckHook")]
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import mmengine
import torch
from mmengine.device import get_device
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import AmpOptimWrapper, BaseOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop
from torch import nn

from ampcheck import AmpChecker, Host, Precision, Session, backward_without_hooks, contained, variables
from ampcheck.integrations.fixes.mmengine import FIXES

__all__ = ["FIXES", "AmpCheckHook"]


@HOOKS.register_module(force=True)
class AmpCheckHook(Hook):  # type: ignore[misc]
    """Reports whether mixed precision is on and sound, and explains precision errors.

    The report goes to ``runner.logger`` and, as JSON, into ``runner.log_dir``. The priority ``LOWEST`` lets every
    other hook finish before this one looks at the model. It watches the first iteration of training and of evaluation;
    after that nothing of this hook runs in an iteration.

    ``select`` and ``ignore`` take rule codes or prefixes (``"AMP2"``). ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) stops the run on a finding that severe. ``watch_steps`` is the number of training iterations to
    watch. ``report`` is the path of the JSON report, or false for none.
    ``numerics`` says how to look for losses, gradients and weights that are not finite: ``"free"`` where training stops
    anyway, ``"guard"`` also once a step, ``"stop"`` before the optimizer's step, raising ``FloatingPointError``, or
    ``"off"``. ``exports=False`` leaves exports in the run alone. ``checker`` replaces all of these.

    Raises ``ValueError`` for an unknown code or option value, and for options passed together with ``checker``.
    """

    priority = "LOWEST"

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: str = "never",
        watch_steps: int = 1,
        report: bool | str = True,
        exports: bool = True,
        numerics: str = "free",
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
        self.checker = self.session.checker
        self._first_iteration = 0

    @contained
    def before_run(self, runner: Any) -> None:
        self.session.warn = runner.logger.warning
        self.session.end()
        for kind in ("train", "val", "test"):
            loop = getattr(runner, f"_{kind}_loop", None)
            if isinstance(loop, BaseLoop):
                self._watch(runner, loop, functools.partial(_failing_batch, loop, runner) if kind == "train" else None)

    @contained
    def before_train(self, runner: Any) -> None:
        self._attach(runner)

    @contained
    def before_val(self, runner: Any) -> None:
        if self.session.state == "detached":
            self._attach(runner)
        else:
            self._look(runner, f"before the validation after iteration {runner.iter}")

    @contained
    def after_train_epoch(self, runner: Any) -> None:
        loss = runner.message_hub.log_scalars.get("train/loss")
        moment = f"at the end of epoch {runner.epoch + 1}"
        self._look(runner, moment, float(loss.current()) if loss is not None else None)

    @contained
    def after_train(self, runner: Any) -> None:
        self._look(runner, "at the end of the training")

    @contained
    def before_test(self, runner: Any) -> None:
        if self.session.state == "detached":
            self._attach(runner)

    @contained
    def after_run(self, runner: Any) -> None:
        self.session.end()

    def _watch(self, runner: Any, loop: BaseLoop, find_batch: functools.partial[Any] | None) -> None:
        """Watch the failures and the first iteration of a loop; a loop with ``find_batch`` trains.

        Shadows the methods of the loop, not of the model, so the model can be pickled and copied at any time.
        """
        self.session.guard(loop, "run", functools.partial(self._failed, loop, find_batch))
        if getattr(loop, "run_iter", None) is None:
            runner.logger.warning(f"AmpCheck: {type(loop).__name__} has no run_iter, so its steps are not watched.")
        elif find_batch is not None:
            self.session.watch_training(loop, "run_iter", find_batch)
        else:
            self.session.watch_evaluation(loop, "run_iter")

    def _look(self, runner: Any, moment: str, loss: float | None = None) -> None:
        steps = runner.iter - self._first_iteration if _steps_each_iteration(runner) else None
        self.session.look(moment, steps=steps, loss=loss)

    def _attach(self, runner: Any) -> None:
        self._first_iteration = runner.iter
        numbered = not runner.iter or _steps_each_iteration(runner)
        wrappers = _optim_wrappers(runner)
        averages = [getattr(hook, "ema_model", None) for hook in runner.hooks if isinstance(hook, EMAHook)]
        self.session.attach(
            _unwrapped(runner.model),
            precision=_declared(runner, wrappers),
            optimizers=[wrapper.optimizer for wrapper in wrappers.values()],
            scaler=next(filter(None, map(_scaler_of, wrappers.values())), None),
            averaged=next((average.module for average in averages if average is not None), None),
            host=Host("mmengine", mmengine.__version__, FIXES),
            log=runner.logger.log,
            directory=getattr(runner, "log_dir", runner.work_dir),
            first_step=runner.iter if numbered else None,
        )
        if _is_compiled(runner.model):
            self.session.unwatch()
            runner.logger.info("ampcheck  the steps are not watched: the model is compiled (`compile` in the config)")

    @contained
    def _failed(self, loop: BaseLoop, find_batch: functools.partial[Any] | None, error: BaseException) -> None:
        # An exception that leaves a validation goes on through the training around it.
        if self.session.state == "attached":
            phase = "evaluation_step" if find_batch is None else "training_step"
            self.session.diagnose(error, phase=phase, step=getattr(loop, "iter", None), find_batch=find_batch)
        self.session.end()


def _failing_batch(loop: BaseLoop, runner: Any, frames: Iterable[FrameType]) -> Callable[[], object] | None:
    """A function that computes the loss of the batch in these frames once more, from the loop's frame; ``None`` if the
    batch cannot be found, or the model cannot run outside its wrapper."""
    model, wrappers = _unwrapped(runner.model), _optim_wrappers(runner).values()
    plain = nn.parallel.DistributedDataParallel, nn.parallel.DataParallel
    if is_model_wrapper(runner.model) and (model is runner.model or not isinstance(runner.model, plain)):
        return None
    own = set(model.parameters())
    if any(map(is_model_wrapper, model.modules())) or not wrappers:
        return None
    if not all(own.issuperset(group["params"]) for one in wrappers for group in one.optimizer.param_groups):
        return None
    for held in variables(frames, "self", "data_batch", function="run_iter"):
        if held["self"] is loop:
            return functools.partial(_step_again, model, held["data_batch"], runner.optim_wrapper)
    return None


def _step_again(model: Any, data: Any, wrapper: Any) -> None:
    """Run ``train_step`` of the model's class, without what ``compile`` put in its place. It runs backward itself."""
    if isinstance(wrapper, OptimWrapperDict):
        stand_in = copy.copy(wrapper)
        stand_in.optim_wrappers = {key: _stand_in(model, one) for key, one in wrapper.items()}
    else:
        stand_in = _stand_in(model, wrapper)
    type(model).train_step(model, data, optim_wrapper=stand_in)


def _stand_in(model: nn.Module, wrapper: OptimWrapper) -> OptimWrapper:
    """A copy of the optimizer wrapper that keeps its own counts, scales nothing, and runs backward without hooks on
    parameters, because processes wait for one another in these hooks."""
    stand_in = copy.copy(wrapper)

    def backward(loss: torch.Tensor, **kwargs: Any) -> None:
        backward_without_hooks(model, loss, **kwargs)
        stand_in._inner_count += 1

    vars(stand_in).update(backward=backward, step=wrapper.optimizer.step)
    return stand_in


def _steps_each_iteration(runner: Any) -> bool:
    """Whether each iteration of training asks for one step of one optimizer."""
    wrapper, model = getattr(runner, "optim_wrapper", None), _unwrapped(runner.model)
    step = getattr(type(model), "train_step", None)
    return getattr(wrapper, "_accumulative_counts", None) == 1 and step is BaseModel.train_step


def _unwrapped(model: nn.Module) -> nn.Module:
    inner = model.module if is_model_wrapper(model) else model
    return inner if isinstance(inner, nn.Module) else model


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``compile`` in the config has replaced a method of the model: under probes it would compile again."""
    return any(hasattr(value, "_torchdynamo_orig_callable") for value in vars(model).values())


def _optim_wrappers(runner: Any) -> dict[str, BaseOptimWrapper]:
    """The optimizer wrappers of a run by their config keys; none if the run only evaluates."""
    wrapper = getattr(runner, "optim_wrapper", None)
    if isinstance(wrapper, OptimWrapperDict):
        return {f"optim_wrapper.{key}": value for key, value in wrapper.items()}
    return {"optim_wrapper": wrapper} if isinstance(wrapper, BaseOptimWrapper) else {}


def _declared(runner: Any, wrappers: Mapping[str, BaseOptimWrapper]) -> Precision:
    """The precision that the config asks for in training; unknown if several optimizer wrappers disagree."""
    loops = {f"{name}_cfg": getattr(runner, f"_{name}_loop", None) for name in ("val", "test")}
    evaluation = next((f"{key}.fp16=True" for key, loop in loops.items() if getattr(loop, "fp16", False) is True), "")
    asked = {_asked_of(wrapper) for wrapper in wrappers.values()}
    source = ", ".join(f"{key}.{_settings(wrapper)}" for key, wrapper in wrappers.items())
    legacy = getattr(runner, "cfg", {}).get("fp16")
    if asked == {_FLOAT32} and isinstance(legacy, Mapping):
        source = f"fp16=dict({', '.join(f'{key}={value!r}' for key, value in legacy.items())})"
        asked = {Precision("mixed", dtype="float16", scaler=True)}
    precision = asked.pop() if len(asked) == 1 else Precision()
    return dataclasses.replace(
        precision,
        device_type=get_device(),
        dtype=precision.dtype or _DEFAULT_DTYPES.get(get_device()) if precision.mixed else precision.dtype,
        source=source or evaluation,
        evaluation_dtype=None if evaluation else "float32",
    )


def _asked_of(wrapper: BaseOptimWrapper) -> Precision:
    """What one optimizer wrapper asks for; unknown for Apex and third-party wrappers, which cast in their own ways."""
    if isinstance(wrapper, AmpOptimWrapper):
        scaler = _scaler_of(wrapper)
        return dataclasses.replace(_MIXED, dtype=_cast_dtype(wrapper), scaler=scaler.is_enabled() if scaler else None)
    return _FLOAT32 if type(wrapper) is OptimWrapper else Precision()


def _scaler_of(wrapper: BaseOptimWrapper) -> torch.amp.GradScaler | None:
    scaler = getattr(wrapper, "loss_scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def _settings(wrapper: BaseOptimWrapper) -> str:
    dtype = _cast_dtype(wrapper)
    return f"type={type(wrapper).__name__!r}" + (f", dtype={dtype!r}" if dtype else "")


def _cast_dtype(wrapper: BaseOptimWrapper) -> str | None:
    dtype = getattr(wrapper, "cast_dtype", None)
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


_MIXED = Precision("mixed")
_FLOAT32 = Precision("true", dtype="float32", scaler=False, explicit=False)
# `mmengine.runner.autocast` without a dtype.
_DEFAULT_DTYPES = {"cpu": "bfloat16", "cuda": str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")}
