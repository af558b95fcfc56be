"""Reads timm's train script: what it passes to its functions, the precision asked for, and the failing batch to run
again."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from ampcheck import Precision, unwrapped, variables

_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "half": "float16"}
_FLAGS = ("--amp", "--native-amp", "--apex-amp", "--amp-impl", "--amp-dtype", "--model-dtype")


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return kwargs
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            values[name] = value
    return values


def model(values: Mapping[str, Any]) -> nn.Module | None:
    named = (values.get("model"), values.get("task"))
    return next((value for value in (*named, *values.values()) if isinstance(value, nn.Module)), None)


def optimizer(values: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    return next((value for value in values.values() if isinstance(value, torch.optim.Optimizer)), None)


def held(values: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What the script passes to its function besides the model."""
    scaler = getattr(values.get("loss_scaler"), "_scaler", values.get("loss_scaler"))
    scaler = scaler if isinstance(scaler, torch.amp.GradScaler) else None
    own = optimizer(values)
    return {
        "precision": _declared(values, model, scaler),
        "optimizers": [] if own is None else [own],
        "scaler": scaler,
        "averaged": _averaged(values),
        "directory": values.get("output_dir"),
    }


def _averaged(values: Mapping[str, Any]) -> nn.Module | None:
    """The module inside one of timm's ``ModelEma`` classes."""
    holder = values.get("model_ema") or getattr(values.get("task"), "trainable_module_ema", None)
    copy = getattr(holder, "module", None) or getattr(holder, "ema", None)
    return copy if isinstance(copy, nn.Module) else None


def _declared(values: Mapping[str, Any], model: nn.Module, scaler: torch.amp.GradScaler | None) -> Precision:
    """The precision that the command line asks for or, if it names none, what the script passes to its function."""
    args, flags = values.get("args"), _given_flags(sys.argv[1:])
    # Not from `device`, which timm 0.9 does not pass on.
    device_type = next((parameter.device.type for parameter in model.parameters()), None)
    source = " ".join(f"{flag} {value}" if value else flag for flag, value in flags.items())
    if getattr(args, "amp_impl", None) == "apex" or "--apex-amp" in flags:
        return Precision(device_type=device_type, source=source)
    scaling = scaler is not None and scaler.is_enabled()
    regions = _dtype_of_regions(values.get("amp_autocast"))
    if getattr(args, "amp", "--amp" in flags) or getattr(args, "native_amp", False):
        asked = getattr(args, "amp_dtype", None) or flags.get("--amp-dtype")
        dtype = _DTYPES.get(str(asked).removeprefix("torch.")) if asked else regions
        source = source or ", ".join(f"args.{k}={v!r}" for k, v in vars(args).items() if k in ("amp", "amp_dtype"))
        return Precision("mixed", device_type, dtype, scaling, source)
    converted = values.get("model_dtype") or getattr(args, "model_dtype", None)
    if converted:
        dtype = str(converted).removeprefix("torch.")
        return Precision("true", device_type, dtype, source=source or f"model_dtype={dtype}")
    if regions:
        return Precision("mixed", device_type, regions, scaling, "the script's `amp_autocast`")
    if hasattr(args, "amp"):
        return Precision("true", device_type, "float32", source="no --amp", explicit=False)
    return Precision(device_type=device_type)


def _given_flags(argv: Sequence[str]) -> dict[str, str]:
    """The command line's flags about precision, with their values."""
    found: dict[str, str] = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            found[flag] = value or ("" if following.startswith("-") or flag.endswith("amp") else following)
    return found


def _dtype_of_regions(amp_autocast: Any) -> str | None:
    """The dtype of the autocast regions that ``amp_autocast()`` makes; ``None`` if it makes none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            region = amp_autocast()
    except Exception:  # noqa: BLE001 - the script will call it itself, and raise there
        return None
    if not isinstance(region, torch.autocast) or not region._enabled:
        return None
    return str(region.fast_dtype).removeprefix("torch.")


def failing_batch(frames: Iterable[FrameType]) -> Callable[[], object] | None:
    """A function that computes the loss of the batch in these frames as the script does, from the variables of its
    loop's frame; ``None`` if these are not what timm's scripts have."""
    values: dict[str, Any] = next(variables(frames, "input", "target", "amp_autocast"), {})
    named: Iterator[Any] = (values.get(name) for name in ("amp_autocast", "task", "model", "loss_fn"))
    amp_autocast, task, model, loss_fn = named
    if not callable(amp_autocast):
        return None

    def by_task() -> object:
        with amp_autocast():
            return _alone(task)(values["input"], values["target"])["loss"]

    def by_model() -> object:
        with amp_autocast():
            return loss_fn(unwrapped(model)(values["input"]), values["target"])

    if isinstance(task, nn.Module):
        return by_task
    return by_model if isinstance(model, nn.Module) and callable(loss_fn) else None


def _alone(task: nn.Module) -> nn.Module:
    """The task with its modules out of their wrappers."""
    alone = copy.copy(task)
    alone._modules = {name: child if child is None else unwrapped(child) for name, child in task._modules.items()}
    return alone
