"""AmpCheck as a Lightning callback, for the packages ``lightning`` and ``pytorch_lightning`` alike."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from traceback import walk_tb
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, NamedTuple, ParamSpec

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ampcheck import AmpChecker, FindingsError, Host, Precision, backward_without_hooks

P = ParamSpec("P")

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

_PRECISIONS: Mapping[str, tuple[Literal["mixed", "true"], str]] = {
    "16-mixed": ("mixed", "float16"),
    "bf16-mixed": ("mixed", "bfloat16"),
    "16-true": ("true", "float16"),
    "bf16-true": ("true", "bfloat16"),
    "32-true": ("true", "float32"),
    "64-true": ("true", "float64"),
}

_STAGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "fit": (("fit_loop", "fit_loop.epoch_loop.val_loop"), "validation_step"),
    "validate": (("validate_loop",), "validation_step"),
    "test": (("test_loop",), "test_step"),
    "predict": (("predict_loop",), "predict_step"),
}

FIXES: Mapping[str, str] = {
    "AMP101": "`Trainer(precision='16-mixed')` and `'bf16-mixed'` run `training_step` under autocast: drop "
    "`autocast(enabled=False)` from it. A precision plugin of your own must enter autocast in `forward_context()`.",
    "AMP102": "Drop the `autocast`: `Trainer(precision='16-mixed')` or `'bf16-mixed'` already runs `training_step` "
    "under it. Or write `torch.autocast(self.device.type)`.",
    "AMP103": "Give the precision with `Trainer(precision=...)`, which takes the device from `accelerator`, in place "
    "of `plugins=[MixedPrecision(..., device=...)]` or of an `autocast` in the module.",
    "AMP104": "Ask for the one you mean, `Trainer(precision='16-mixed')` or `Trainer(precision='bf16-mixed')`, and "
    "drop `autocast` from the module.",
    "AMP105": "`Trainer(precision=...)` covers `validation_step`, `test_step` and `predict_step` as it does "
    "`training_step`: drop `autocast` from the module.",
    "AMP106": "Return the loss from `training_step` and Lightning runs backward outside. Under manual optimization "
    "wrap `self.manual_backward(loss)` in `torch.autocast(self.device.type, enabled=False)`.",
    "AMP107": "Choose another `Trainer(precision=...)`: '16-mixed', 'bf16-mixed' or '32-true'.",
    "AMP108": "`Trainer(precision='16-mixed')` makes region and scaler itself; a scaler of your own goes into "
    "`MixedPrecision('16-mixed', 'cuda', scaler=torch.amp.GradScaler('cuda'))`.",
    "AMP109": "Drop `autocast` from the module; if it has none, update Lightning: since 2.6 its own region keeps no "
    "weights that were cast under `no_grad`.",
    "AMP201": "Leave the model in float32 for `Trainer(precision='16-mixed')` or `'bf16-mixed'`; for half-precision "
    "parameters drop `.half()` and ask for `Trainer(precision='bf16-true')`: under '16-true' the `eps` of AdamW is 0, "
    "and its first step may give NaN.",
    "AMP202": "Drop `.half()` and `.to(dtype)` from the module: `Trainer(precision=...)` converts the whole model, "
    "or nothing of it.",
    "AMP203": "Autocast covers `training_step` and the other `*_step` methods alone: give it `.float()` where the "
    "module turns it off, and what other hooks compute a `torch.autocast(self.device.type)` of its own. Under "
    "`Trainer(precision='bf16-true')` or `'16-true'` make tensors with `dtype=self.dtype`.",
    "AMP204": "Cast batches in `on_before_batch_transfer()`, or ask for float64 by `Trainer(precision='64-true')`.",
    "AMP205": "Or let it have operands of one dtype, without autocast: `Trainer(precision='bf16-true')` or "
    "`'32-true'`.",
    "AMP208": "`Trainer(precision='bf16-true')` converts buffers and all parameters.",
    "AMP211": "Averaging callbacks copy the dtypes of the model: `Trainer(precision='16-mixed')` and `'bf16-mixed'` "
    "keep them float32.",
    "AMP301": "`Trainer(precision='16-mixed')` brings its scaler, and under manual optimization "
    "`self.manual_backward(loss)` applies it. Or choose `Trainer(precision='bf16-mixed')`, which needs none.",
    "AMP302": "`Trainer(precision='bf16-mixed')` and `'32-true'` use no scaler: drop the one the module makes.",
    "AMP303": "Leave the model in float32 for `Trainer(precision='16-mixed')`, or ask for "
    "`Trainer(precision='bf16-true')`, which has no scaler.",
    "AMP305": "Give `Trainer(gradient_clip_val=...)`, or clip in `on_before_optimizer_step()`, which is called after "
    "unscaling.",
    "AMP308": "Drop `fused=True` from the optimizer or `gradient_clip_val` from the trainer, or choose "
    "`Trainer(precision='bf16-true')`.",
    "AMP309": "Build the optimizer from `self.parameters()` in `configure_optimizers()`, and layers before it, in "
    "`__init__()` or `configure_model()`.",
    "AMP311": "Return the loss from `training_step`, or call `self.manual_backward(loss)` in place of "
    "`loss.backward()`.",
    "AMP401": "Lightning runs backward after `training_step` has returned: write out of place until then. Under manual "
    "optimization a write may come after `self.manual_backward(loss)`.",
    "AMP403": "Leave the parameters to `optimizer.step()`; what you change by hand belongs inside `with "
    "torch.no_grad():`, in `on_train_batch_end()`.",
    "AMP405": "Under manual optimization call every `self.manual_backward(...)` that uses a forward pass before the "
    "`optimizer.step()`, or run that forward pass again after it; `toggle_optimizer()` does not change this.",
    "AMP406": "Lightning evaluates in inference mode: `.clone()` in `training_step` what `validation_step` has made, "
    "or set `Trainer(inference_mode=False)`.",
    "AMP407": "Give `Trainer(strategy=DDPStrategy(broadcast_buffers=False))`, or call the module once in "
    "`training_step`, on both batches together.",
    "AMP408": "`training_step` has to return a loss with its graph, and `.detach()` what it keeps for the next batch. "
    "Under manual optimization only the last `self.manual_backward(loss)` of a graph comes without "
    "`retain_graph=True`.",
    "AMP410": "Look at the gradients of parameters in `on_after_backward()` or `on_before_optimizer_step()`, which "
    "need no hook on a module.",
}


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


def _contained(hook: Callable[Concatenate[AmpCheck, P], None]) -> Callable[Concatenate[AmpCheck, P], None]:
    """Make a callback hook unable to raise anything into the training but the ``FindingsError`` that was asked for."""

    @functools.wraps(hook)
    def call(self: AmpCheck, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._off:
            return
        try:
            hook(self, *args, **kwargs)
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the user's
            self._off = True
            with suppress(Exception):
                self._take_back()
            self.checker.switch_off(error, emit=self._logger.warning)
            self.checker.detach()

    return call


class AmpCheck(Callback):
    """Tells at fit start and after the first steps whether mixed precision is on and sound, and explains a crash.

    ``Trainer(callbacks=[AmpCheck()], ...)``. The report goes to Lightning's logger on rank zero, and as
    ``ampcheck.json`` into ``trainer.log_dir`` (none under ``fast_dev_run``).

    Args:
        select: Rule codes or prefixes to judge (``"AMP2"``, or several); empty for all.
        ignore: Rule codes or prefixes to leave out.
        fail_on: ``"error"`` or ``"warning"`` stops the run with ``FindingsError`` at such a finding.
        watch_steps: How many training steps to watch.
        report: Where the JSON goes: true for the run's directory, a path, or false for nowhere.
        checker: A checker of your own, in place of all the options above.

    Raises:
        ValueError: On an unknown rule code or option value, or where ``checker`` comes with other options.
    """

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: Literal["error", "warning", "never"] = "never",
        watch_steps: int = 1,
        report: bool | str | os.PathLike[str] = True,
        checker: AmpChecker | None = None,
    ) -> None:
        super().__init__()
        if checker is None:
            checker = AmpChecker(select=select, ignore=ignore, fail_on=fail_on, watch_steps=watch_steps, report=report)
        elif (select, ignore, fail_on, watch_steps, report) != ((), (), "never", 1, True):
            raise ValueError("AmpCheck takes either `checker` or options for one, not both")
        self.checker = checker
        self._logger = logging.getLogger(_PACKAGES[0])
        self._wraps: list[_Wrap] = []
        self._fitted = False
        self._off = False

    @_contained
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._logger = logging.getLogger(_package_of(trainer).__name__)
        loops, step = _STAGES[stage]
        for loop in loops:
            self._wrap(trainer, f"{loop}.run", self._run_loop, trainer)
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            if trainer.is_global_zero:
                self._logger.info("ampcheck  the module is compiled as a whole: its steps are not watched")
            return
        if stage == "fit":
            for optimization in ("automatic_optimization", "manual_optimization"):
                self._wrap(trainer, f"fit_loop.epoch_loop.{optimization}.run", self._train_batch, trainer)
        self._wrap(trainer, f"strategy.{step}", self._evaluate_batch)

    @_contained
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @_contained
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between the two, checkpoints are restored and the module's own `on_fit_start` has run.
        self._attach(trainer)

    @_contained
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._attach(trainer)

    @_contained
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @_contained
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._attach(trainer)

    @_contained
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._diagnose(trainer, exception)
        self._release()

    @_contained
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _attach(self, trainer: Trainer) -> None:
        package = _package_of(trainer)
        # A test that follows a fit must not write over the fit's report.
        self._fitted = self._fitted or trainer.state.fn == "fit"
        directory = _directory(trainer) if trainer.state.fn == "fit" or not self._fitted else None
        self.checker.attach(
            trainer.lightning_module,
            precision=_declared(trainer, package),
            optimizers=trainer.optimizers,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            averaged=_averaged(trainer),
            host=Host("lightning", package.__version__, FIXES),
            emit=self._logger.info,
            directory=directory,
        )

    def _train_batch(self, trainer: Trainer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.checker.training_step(batch=functools.partial(_failing_batch, trainer)):
            output = run(*args, **kwargs)
        if not self.checker.watching:
            self._unwrap(self._train_batch)
        return output

    def _evaluate_batch(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.checker.evaluation_step():
            output = step(*args, **kwargs)
        if not self.checker.watching_evaluation:
            self._unwrap(self._evaluate_batch)
        return output

    def _run_loop(self, trainer: Trainer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Spawned and forked processes call no `on_exception`: only their parent does, with a copy of the text.
        try:
            return run(*args, **kwargs)
        except Exception as error:
            self._diagnose(trainer, error)
            self._release()
            raise

    @_contained
    def _diagnose(self, trainer: Trainer, error: BaseException) -> None:
        training = getattr(trainer.state.stage, "value", None) == "train"
        phase = "training_step" if training else "evaluation_step"
        batch = None
        if training:
            # What the frames alone tell is worth more than nothing.
            with suppress(Exception):
                batch = _failing_batch(trainer, (frame for frame, _ in walk_tb(error.__traceback__)))
        self.checker.diagnose(error, phase=phase, step=trainer.global_step, batch=batch)

    def _wrap(self, owner: Any, path: str, wrapper: Callable[..., Any], *first: Any) -> None:
        """Put ``wrapper(*first, method, ...)`` before the method at ``path``, on its instance alone."""
        *parents, name = path.split(".")
        try:
            owner = functools.reduce(getattr, parents, owner)
            method = getattr(owner, name)
        except AttributeError:
            self._logger.warning("ampcheck  this Lightning has no `trainer.%s`: it is not watched", path)
            return
        self._wraps.append(_Wrap(owner, name, wrapper, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, functools.partial(wrapper, *first, method))

    def _take_back(self, *wrappers: Callable[..., Any]) -> None:
        """Take wraps by these wrappers (default: all) off again."""
        for wrap in [wrap for wrap in reversed(self._wraps) if not wrappers or wrap.wrapper in wrappers]:
            self._wraps.remove(wrap)
            if wrap.before is _ABSENT:
                vars(wrap.owner).pop(wrap.name, None)
            else:
                setattr(wrap.owner, wrap.name, wrap.before)

    @_contained
    def _unwrap(self, wrapper: Callable[..., Any]) -> None:
        self._take_back(wrapper)

    @_contained
    def _release(self) -> None:
        self._take_back()
        self.checker.detach()


class _Wrap(NamedTuple):
    """A wrapped method of one instance; ``before`` is the instance's own attribute that it hides, if any."""

    owner: Any
    name: str
    wrapper: Callable[..., Any]
    before: Any


_ABSENT = object()


def _package_of(trainer: Trainer) -> ModuleType:
    """The Lightning package whose trainer this is."""
    packages = _imported()
    return next((package for package in packages if isinstance(trainer, package.Trainer)), packages[0])


def _declared(trainer: Any, package: ModuleType) -> Precision:
    """What the trainer was asked for, from its precision plugin and, where it made that one itself, its argument."""
    plugin = trainer.precision_plugin
    asked = str(getattr(plugin, "precision", None))
    given = getattr(getattr(trainer, "_accelerator_connector", None), "_precision_plugin_flag", None) is plugin
    source = f"Trainer(plugins=[{type(plugin).__name__}({asked!r})])" if given else f"Trainer(precision={asked!r})"
    # These two cast by themselves, whatever `precision` says.
    others = tuple(
        getattr(package.plugins, name)
        for name in ("DeepSpeedPrecision", "BitsandbytesPrecision")
        if hasattr(package.plugins, name)
    )
    if asked not in _PRECISIONS or isinstance(plugin, others):
        return Precision(source=source)
    mode, dtype = _PRECISIONS[asked]
    device_type = torch.device(getattr(plugin, "device", None) or trainer.strategy.root_device).type
    if mode == "true":
        return Precision(mode, device_type, dtype, source=source, explicit=given or asked != "32-true")
    if asked == "bf16-mixed" and device_type == "cpu" and not given:
        source += " (on a CPU Lightning makes the same of '16-mixed')"
    scaler = getattr(plugin, "scaler", None)
    return Precision(mode, device_type, dtype, scaler is not None and scaler.is_enabled(), source)


def _failing_batch(trainer: Any, frames: Iterable[FrameType]) -> Callable[[], object] | None:
    """What computes the loss of the batch in these frames once more; ``None`` where it cannot be found, or the module
    not be run outside its strategy."""
    module = trainer.lightning_module
    strategies = (getattr(package.strategies, "DeepSpeedStrategy", None) for package in _imported())
    if isinstance(trainer.strategy, tuple(filter(None, strategies))):
        return None
    if any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules()):
        return None
    arguments = _arguments_of_step(trainer, frames)
    # An iterator would hand out the batch after the one that failed.
    if arguments is None or any(isinstance(argument, Iterator) for argument in arguments):
        return None
    if not module.automatic_optimization:
        own = set(module.parameters())
        if not all(own.issuperset(group["params"]) for one in trainer.optimizers for group in one.param_groups):
            return None
    return functools.partial(_step_again, trainer, arguments)


def _arguments_of_step(trainer: Any, frames: Iterable[FrameType]) -> tuple[Any, ...] | None:
    """The arguments of the ``training_step`` that these frames are in, from the loop's."""
    epoch_loop = trainer.fit_loop.epoch_loop
    loops = [getattr(epoch_loop, f"{kind}_optimization", None) for kind in ("automatic", "manual")]
    for frame in frames:
        if frame.f_code.co_name == "run":
            names = frame.f_locals
            loop, arguments = names.get("self"), names.get("kwargs")
            if loop is not None and any(loop is one for one in loops) and isinstance(arguments, Mapping):
                return tuple(arguments.values())
    return None


def _step_again(trainer: Any, arguments: tuple[Any, ...]) -> object:
    """``training_step`` as the strategy calls it, on the module without its wrapper: nothing is logged, and no
    progress counted. Returns the loss; under manual optimization ``None``, since the step runs backward itself."""
    module = trainer.lightning_module
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, tuple(package.LightningModule for package in _imported())):
                for name in ("log", "log_dict", "print"):
                    stack.enter_context(_shadowed(part, name, _nothing))
        if not module.automatic_optimization:
            # A step that died in between leaves the parameters of the other optimizers frozen.
            for parameter, required in getattr(module, "_param_requires_grad_state", {}).items():
                parameter.requires_grad_(required)
            backward = functools.partial(backward_without_hooks, module)
            stack.enter_context(_shadowed(module, "manual_backward", backward))
            for wrapped in trainer.strategy._lightning_optimizers:
                stack.enter_context(_shadowed(wrapped, "step", wrapped.optimizer.step))
            for config in trainer.lr_scheduler_configs:
                stack.enter_context(_shadowed(config.scheduler, "step", _nothing))
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments)
    if not module.automatic_optimization:
        return None
    return output.get("loss") if isinstance(output, Mapping) else output


@contextmanager
def _shadowed(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let ``method`` hide the method of one instance for a while."""
    attributes = vars(owner)
    before = attributes.get(name, _ABSENT)
    attributes[name] = method
    try:
        yield
    finally:
        if before is _ABSENT:
            del attributes[name]
        else:
            attributes[name] = before


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what would be logged or counted twice."""


def _averaged(trainer: Any) -> nn.Module | None:
    """The averaged copy of the model that one of Lightning's averaging callbacks keeps, if one is there."""
    for callback in trainer.callbacks:
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, AveragedModel):
            return copy.module
        if isinstance(copy, nn.Module):
            return copy
    return None


def _directory(trainer: Any) -> str | None:
    """Where the run's files go; ``None`` where it writes none, or not to a disk. To be called on every rank."""
    directory = trainer.log_dir or trainer.default_root_dir
    return None if trainer.fast_dev_run or "://" in directory else directory
