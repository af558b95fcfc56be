"""Fixes in the words of timm's train script, for the installed version."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import timm.utils

_EMA = "ModelEmaV3" if hasattr(timm.utils, "ModelEmaV3") else "ModelEmaV2"
_NAMES_DEVICE = "device" in inspect.signature(getattr(timm.utils, "NativeScaler")).parameters  # noqa: B009
_SCALER = "NativeScaler(device=device.type)" if _NAMES_DEVICE else "NativeScaler()"

FIXES: Mapping[str, str] = {
    "AMP101": "If `args.amp` is set, pass `amp_autocast=partial(torch.autocast, device_type=device.type, "
    "dtype=amp_dtype)` to `train_one_epoch`, and compute model and loss inside `with amp_autocast():`. Or drop "
    "`--amp`.",
    "AMP102": "Write `amp_autocast = partial(torch.autocast, device_type=device.type, dtype=amp_dtype)`: `device_type` "
    "is a string.",
    "AMP103": "Use the model's device for the region: `partial(torch.autocast, device_type=device.type, ...)`, with "
    "the `device` of `--device`.",
    "AMP104": "Pass the dtype of `--amp-dtype` to the region: `partial(torch.autocast, ..., dtype=amp_dtype)`.",
    "AMP105:only-evaluation": "Pass the `amp_autocast` of `validate(...)` to `train_one_epoch(...)` too, and compute "
    "model and loss inside `with amp_autocast():`, or pass it to neither.",
    "AMP105": "Pass the `amp_autocast` (and the `model_dtype`) of `train_one_epoch(...)` to every `validate(...)`, the "
    "averaged model's too.",
    "AMP106": "End `with amp_autocast():` before `loss_scaler(loss, optimizer, ...)` or `loss.backward()`: "
    "`NativeScaler` runs backward when it is called.",
    "AMP107:float16": "Pass `--amp-dtype float16`, or drop `--amp`.",
    "AMP107:bfloat16": "Pass `--amp-dtype bfloat16`, or drop `--amp`.",
    "AMP107:float32": "Drop `--amp`.",
    "AMP108": "Write `partial(torch.autocast, device_type=device.type, dtype=amp_dtype)`"
    + ("; `NativeScaler(device=device.type)` makes a `torch.amp.GradScaler`." if _NAMES_DEVICE else "."),
    "AMP109": "Write `amp_autocast = partial(torch.autocast, ..., cache_enabled=False)`.",
    "AMP201": "Drop `--model-dtype` with `--amp`, and do not convert what `create_model` returns. For half-precision "
    "parameters drop `--amp` and pass `--model-dtype bfloat16`.",
    "AMP202": "Convert the whole model at once, with `--model-dtype` or `model.to(device=device, dtype=model_dtype)`.",
    "AMP203": "In your own loop, do as `train_one_epoch` does: call model and loss inside `with amp_autocast():`.",
    "AMP203:low-precision-parameter": "",
    "AMP203:low-precision-model": "With `--model-dtype` convert the images too, `input.to(device=device, "
    "dtype=model_dtype)`: pass `model_dtype` to every `train_one_epoch(...)` and `validate(...)`, the averaged "
    "model's too.",
    "AMP204": "Pass `--model-dtype float32`, which converts the model and, in timm's loaders, the images.",
    "AMP205": "Or drop `--amp`, so that all operations get operands of one dtype.",
    "AMP210": "Pass `--bce-loss`, which uses `timm.loss.BinaryCrossEntropy` on logits.",
    "AMP211": f"Drop `--model-dtype`, because `timm.utils.{_EMA}` copies the dtypes of the model"
    + (
        ", or make it with `dtype=torch.float32`."
        if "dtype" in inspect.signature(getattr(timm.utils, _EMA)).parameters
        else "."
    ),
    "AMP301": f"Pass `--amp-dtype bfloat16`, or `loss_scaler={_SCALER}`, which timm's script makes only for float16 on "
    "CUDA.",
    "AMP302": "Make the `NativeScaler` only for float16: set `loss_scaler = None` with `--amp-dtype bfloat16` or "
    "without `--amp`.",
    "AMP309": "Call `create_optimizer_v2` after the last line that makes a new model (`convert_sync_batchnorm`, "
    "`convert_splitbn_model`, a new classifier), with that model.",
    "AMP401": "For dropout before timm's own classifier, use `create_model(..., drop_rate=...)`, which is out of "
    "place. Do not write to what timm's modules return: it is often the output of an in-place activation.",
    "AMP403": "Use `timm.layers.trunc_normal_` or another initializer of `timm.layers`: they write under `no_grad`.",
    "AMP405": "With several losses, add them up, or pass `need_update=False` for all but the last: `NativeScaler` runs "
    "backward and `optimizer.step()` when it is called.",
    "AMP406:parameters": "",
    "AMP406": "Do not train on tensors from timm's `validate`, which runs under `torch.inference_mode()`. Compute the "
    "features of a frozen `create_model(...)` under `torch.no_grad()`, as timm's distillation tasks do for the "
    "teacher.",
    "AMP407": "Pass `--no-ddp-bb`, so that DistributedDataParallel broadcasts no buffers; `--dist-bn reduce`, the "
    "default, still averages batch norm statistics after each epoch.",
    "AMP408": "Remove `loss.backward()`: `loss_scaler(loss, optimizer, ...)` runs backward itself. If you need a "
    "second backward, pass `create_graph=True` to that call.",
    "AMP501": "Pass `--numerics stop` before the script, which stops at such a step before the weights change.",
    "AMP502:bfloat16": "Or pass `--amp-dtype bfloat16`, in which this batch is finite.",
    "AMP503:bfloat16": "Or pass `--amp-dtype bfloat16`, in which this batch is finite.",
    "AMP508": "Drop `--model-dtype`, and pass `--amp --amp-dtype bfloat16`, which keeps the weights in float32.",
    "AMP509": "Drop `--model-dtype` and pass `--amp`, which keeps the weights in float32, or pass `--opt-eps 1e-4`.",
    "AMP510": "Look at these samples in the data of `--data-dir`, and at your own transforms.",
    "AMP511": "Pass `--numerics stop` before the script, and `--resume` a checkpoint from before: the script saves "
    "what is broken like any other.",
    "AMP512": "Pass `--numerics guard` before the script to see why; the scaler is `loss_scaler._scaler`.",
    "AMP515": "Pass `--clip-grad 1.0`, a lower `--lr`, or more `--warmup-epochs`.",
    "AMP410": "Set `inplace = False` on the activation next to the hook (in a norm layer it is `bn.act`); timm's "
    "activations each have this flag.",
}
