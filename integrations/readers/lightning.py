"""Reads a Lightning trainer: what it holds, the precision it was asked for, and the failing batch to run again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType, ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ampcheck import Precision, backward_without_hooks, shadow, variables

_PRECISIONS: Mapping[str, tuple[Literal["mixed", "true"], str]] = {
    "16-mixed": ("mixed", "float16"),
    "bf16-mixed": ("mixed", "bfloat16"),
    "16-true": ("true", "float16"),
    "bf16-true": ("true", "bfloat16"),
    "32-true": ("true", "float32"),
    "64-true": ("true", "float64"),
}
_LOSSES = ("train_loss", "train/loss", "training_loss", "train_loss_step", "train_loss_epoch", "loss")


def held(trainer: Any, package: ModuleType) -> dict[str, Any]:
    """What a trainer holds besides its module."""
    return {
        "precision": _declared(trainer, package),
        "optimizers": trainer.optimizers,
        "scaler": getattr(trainer.precision_plugin, "scaler", None),
        "averaged": _averaged(trainer),
    }


def _averaged(trainer: Any) -> nn.Module | None:
    """The averaged copy of the model that one of Lightning's averaging callbacks keeps, if there is one."""
    for callback in trainer.callbacks:
        copy = getattr(callback, "_average_model", None)
        if isinstance(copy, AveragedModel):
            return copy.module
        if isinstance(copy, nn.Module):
            return copy
    return None


def _declared(trainer: Any, package: ModuleType) -> Precision:
    """The precision asked for, read from the precision plugin and, if the trainer made that itself, its argument."""
    plugin = trainer.precision_plugin
    asked = str(getattr(plugin, "precision", None))
    given = getattr(getattr(trainer, "_accelerator_connector", None), "_precision_plugin_flag", None) is plugin
    source = f"Trainer(plugins=[{type(plugin).__name__}({asked!r})])" if given else f"Trainer(precision={asked!r})"
    # These two cast in their own ways, whatever `precision` says.
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


def logged_loss(trainer: Any) -> float | None:
    """The training loss as the module logs it; ``None`` if it logs none, or processes would wait for one another."""
    if trainer.world_size > 1:
        return None
    metrics = trainer.callback_metrics
    value = next((metrics[name] for name in _LOSSES if name in metrics), None)
    return None if value is None else float(value)


def failing_batch(
    trainer: Any, packages: Sequence[ModuleType], frames: Iterable[FrameType]
) -> Callable[[], object] | None:
    """A function that computes the loss of the batch in these frames once more; ``None`` if the batch cannot be found,
    or the module cannot run outside its strategy."""
    module = trainer.lightning_module
    strategies = (getattr(package.strategies, "DeepSpeedStrategy", None) for package in packages)
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
    kinds = tuple(package.LightningModule for package in packages)
    return functools.partial(_step_again, trainer, kinds, arguments)


def _arguments_of_step(trainer: Any, frames: Iterable[FrameType]) -> tuple[Any, ...] | None:
    """The arguments of the ``training_step`` that these frames are in, from the loop's frame."""
    epoch_loop = trainer.fit_loop.epoch_loop
    loops = [getattr(epoch_loop, f"{kind}_optimization", None) for kind in ("automatic", "manual")]
    for held in variables(frames, "self", "kwargs", function="run"):
        if any(held["self"] is loop for loop in loops) and isinstance(held["kwargs"], Mapping):
            return tuple(held["kwargs"].values())
    return None


def _step_again(trainer: Any, kinds: tuple[type, ...], arguments: tuple[Any, ...]) -> object:
    """Run ``training_step`` as the strategy does, on the module without its wrapper, without logging or counting
    progress. Returns the loss; ``None`` under manual optimization, where the step runs backward itself."""
    module = trainer.lightning_module
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, kinds):
                for name in ("log", "log_dict", "print"):
                    stack.callback(shadow(part, name, _nothing).give_back)
        if not module.automatic_optimization:
            # A step that failed halfway leaves the parameters of the other optimizers frozen.
            for parameter, required in getattr(module, "_param_requires_grad_state", {}).items():
                parameter.requires_grad_(required)
            backward = functools.partial(backward_without_hooks, module)
            stack.callback(shadow(module, "manual_backward", _instead, backward).give_back)
            for wrapped in trainer.strategy._lightning_optimizers:
                stack.callback(shadow(wrapped, "step", _instead, wrapped.optimizer.step).give_back)
            for config in trainer.lr_scheduler_configs:
                stack.callback(shadow(config.scheduler, "step", _nothing).give_back)
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments)
    if not module.automatic_optimization:
        return None
    return output.get("loss") if isinstance(output, Mapping) else output


def _instead(other: Callable[..., Any], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return other(*args, **kwargs)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces what would log or count twice."""
