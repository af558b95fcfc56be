"""Reads Ultralytics: what the installed version does, what its trainer holds, the precision asked for, and the failing
batch to run again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
import ultralytics
from ultralytics.utils import DEFAULT_CFG_DICT, dist, torch_utils

from ampcheck import Precision, variables

# Whether the processes that Ultralytics starts for several devices get the callbacks.
HANDS_ON_CALLBACKS = "callbacks" in dist.generate_ddp_file.__code__.co_names
NOTHING_WATCHED = (
    f"AmpCheck: nothing was watched: Ultralytics {ultralytics.__version__} trains on several devices in "
    "new processes, and does not pass callbacks to them. Start this program with `torchrun --nproc-per-node N`, with "
    "the same `device=`, to train in watched processes."
)
NO_STEP_WATCHED = (
    f"AmpCheck: Ultralytics {ultralytics.__version__} runs no callback after a failure, so no step is watched. "
    "Use `AmpCheck().attach(model)` instead of the callbacks to watch steps."
)


def tears_down_after_failure(trainer: Any) -> bool:
    """Whether ``train`` itself runs the ``teardown`` event, in a ``finally``; older versions run it only if training
    succeeds."""
    trains = (vars(cls).get("train") for cls in type(trainer).__mro__)
    return any("teardown" in getattr(getattr(train, "__code__", None), "co_consts", ()) for train in trains)


def held(trainer: Any, amp_given: bool) -> dict[str, Any]:
    """What a trainer holds besides its model."""
    optimizer = getattr(trainer, "optimizer", None)
    return {
        "precision": _declared(trainer, amp_given),
        "optimizers": [] if optimizer is None else [optimizer],
        "scaler": getattr(trainer, "scaler", None),
        "averaged": getattr(getattr(trainer, "ema", None), "ema", None),
        "directory": getattr(trainer, "save_dir", None),
    }


def _declared(trainer: Any, given: bool) -> Precision:
    """The precision that ``amp=`` asks for. ``True`` means torch's default dtype on an accelerator, and no dtype on a
    CPU, where Ultralytics has no AMP. Validation runs in that default, whatever the dtype of training."""
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


def epoch_loss(trainer: Any) -> float | None:
    """The mean loss of the epoch, which Ultralytics shows beside its progress bar."""
    mean = getattr(trainer, "tloss", None)
    parts = mean.values() if isinstance(mean, Mapping) else [mean]
    losses = [float(part.sum()) for part in parts if isinstance(part, torch.Tensor)]
    return sum(losses) if losses else None


def failing_batch(trainer: Any, frames: Iterable[FrameType]) -> Callable[[], object] | None:
    """A function that computes the loss of the batch in these frames as the trainer does; ``None`` without a batch."""
    frames = list(frames)
    batch = next(variables(frames, "batch", function="_do_train"), {}).get("batch")
    if not isinstance(batch, dict):
        return None
    raw = any(frame.f_code.co_name == "preprocess_batch" for frame in frames)
    return functools.partial(_loss, trainer, batch, raw=raw)


def _loss(trainer: Any, batch: Mapping[str, Any], raw: bool) -> object:
    """The loss of a batch as ``BaseTrainer._do_train`` computes it; ``raw``: the batch is not preprocessed yet."""
    unwrap = getattr(torch_utils, "unwrap_model", None) or getattr(torch_utils, "de_parallel")  # noqa: B009
    dtype = torch.bfloat16 if trainer.args.amp == "bf16" else None
    with torch.autocast(trainer.device.type, dtype, enabled=bool(trainer.amp)):
        batch = dict(batch)
        return unwrap(trainer.model)(trainer.preprocess_batch(batch) if raw else batch)[0].sum()
