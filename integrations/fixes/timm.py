"""Remedies in the words of timm's train script, for the version that is installed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import timm.utils

_EMA = "ModelEmaV3" if hasattr(timm.utils, "ModelEmaV3") else "ModelEmaV2"
_NAMES_DEVICE = "device" in inspect.signature(getattr(timm.utils, "NativeScaler")).parameters  # noqa: B009
_SCALER = "NativeScaler(device=device.type)" if _NAMES_DEVICE else "NativeScaler()"

FIXES: Mapping[str, str] = {
    "AMP101": "Hand `amp_autocast=partial(torch.autocast, device_type=device.type, dtype=amp_dtype)` to "
    "`train_one_epoch` where `args.amp` is set, and compute model and loss in its `with amp_autocast():`. Or drop "
    "`--amp`.",
    "AMP102": "`amp_autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)`: `device_type` is a "
    "string.",
    "AMP103": "Take the region's device from the model's: `partial(torch.autocast, device_type=device.type, ...)`, "
    "with the `device` that `--device` names.",
    "AMP104": "Hand the dtype of `--amp-dtype` to `partial(torch.autocast, ..., dtype=amp_dtype)`.",
    "AMP105": "Give every `validate(...)`, the averaged model's too, the `amp_autocast` (and the `model_dtype`) of "
    "`train_one_epoch(...)`.",
    "AMP106": "End `with amp_autocast():` before `loss_scaler(loss, optimizer, ...)` or `loss.backward()`: "
    "`NativeScaler` runs backward when it is called.",
    "AMP107": "`--amp-dtype float16` or `--amp-dtype bfloat16`, whichever is native here, or no `--amp`.",
    "AMP108": "`partial(torch.autocast, device_type=device.type, dtype=amp_dtype)`"
    + ("; `NativeScaler(device=device.type)` makes a `torch.amp.GradScaler`." if _NAMES_DEVICE else "."),
    "AMP109": "`amp_autocast = partial(torch.autocast, ..., cache_enabled=False)`.",
    "AMP201": "Leave `--model-dtype` out with `--amp`, and do not convert what `create_model` returns; for "
    "half-precision parameters drop `--amp` and say `--model-dtype bfloat16`.",
    "AMP202": "Convert the whole model at once: `--model-dtype` does, or `model.to(device=device, dtype=model_dtype)`.",
    "AMP203": "`train_one_epoch` calls model and loss inside `with amp_autocast():`, and `--model-dtype` converts "
    "model and images alike: do the same in a loop of your own (`input.to(device=device, dtype=model_dtype)`).",
    "AMP204": "`--model-dtype float32` converts the model, and in timm's loaders the images.",
    "AMP205": "Or give all operations operands of one dtype: leave `--amp` out.",
    "AMP210": "`--bce-loss` takes `timm.loss.BinaryCrossEntropy`, which works on logits.",
    "AMP211": f"`timm.utils.{_EMA}` copies the model with its dtypes: leave `--model-dtype` out"
    + (
        ", or make it with `dtype=torch.float32`."
        if "dtype" in inspect.signature(getattr(timm.utils, _EMA)).parameters
        else "."
    ),
    "AMP301": f"`--amp-dtype bfloat16`, or `loss_scaler={_SCALER}`, which timm's script makes "
    "for float16 on CUDA alone.",
    "AMP302": "Make the `NativeScaler` for float16 alone: `loss_scaler = None` with `--amp-dtype bfloat16` or without "
    "`--amp`.",
    "AMP309": "Call `create_optimizer_v2` after the last line that makes a new model (`convert_sync_batchnorm`, "
    "`convert_splitbn_model`, a new classifier), with that model.",
    "AMP401": "`create_model(..., drop_rate=...)` gives dropout before timm's own classifier, out of place. What "
    "timm's modules return is often the output of an in-place activation, and not to be written to.",
    "AMP403": "`timm.layers.trunc_normal_` and the other initializers of `timm.layers` write under `no_grad`.",
    "AMP405": "`NativeScaler` runs backward and `optimizer.step()` when it is called: with several losses, add them "
    "up, or say `need_update=False` for all but the last.",
    "AMP406": "timm's `validate` runs under `torch.inference_mode()`: do not train on what is kept from it; compute "
    "features of a frozen `create_model(...)` under `torch.no_grad()`, as timm's distillation tasks do their "
    "teacher's.",
    "AMP407": "`--no-ddp-bb` makes DistributedDataParallel send no buffers; `--dist-bn reduce`, the default, still "
    "averages batch norm statistics after each epoch.",
    "AMP408": "`NativeScaler` runs backward when it is called: no `loss.backward()` beside `loss_scaler(loss, "
    "optimizer, ...)`, and `create_graph=True` in that call where a second one is meant.",
    "AMP410": "timm's activations carry a flag of their own: `inplace = False` on the one next to the hook (in a norm "
    "layer it is `bn.act`), not on all.",
}
