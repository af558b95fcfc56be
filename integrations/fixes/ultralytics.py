"""Fixes in Ultralytics' words, for the installed version."""

from __future__ import annotations

from collections.abc import Mapping

from ultralytics.cfg import get_cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils import torch_utils


def _names_dtypes() -> bool:
    """Whether ``amp=`` takes the names of dtypes and rejects other text. Older versions take any text, or none."""
    try:
        get_cfg(overrides={"amp": "no dtype"})
    except (TypeError, ValueError) as refused:
        return isinstance(refused, ValueError)
    return False


_NAMES_DTYPES = _names_dtypes()
_RECOVERS = hasattr(BaseTrainer, "_handle_nan_recovery")
_CLEANS = "nan_to_num_" in BaseTrainer.save_model.__code__.co_names
_IN_PLACE = "inplace" in torch_utils.initialize_weights.__code__.co_names

FIXES: Mapping[str, str] = {
    "AMP101": "Train on an accelerator that passes Ultralytics' AMP check (`device=0`; see the log lines that begin "
    "with `AMP:`), or set `amp=False` if you want float32.",
    "AMP102": "Write `device_type=` for `torch.autocast`; the helper that takes `device=` is "
    "`ultralytics.utils.torch_utils.autocast(enabled, device='cuda')`.",
    "AMP103": "Enter your own regions for `batch['img'].device.type`: Ultralytics moves the model to `device=`.",
    "AMP104": "Set the dtype by name: `amp='bf16'` or `amp='fp16'`."
    if _NAMES_DTYPES
    else "Use `amp=True`, which takes torch's default for the device: this version has no setting for the dtype.",
    "AMP105:only-evaluation": "Remove what turns autocast off in training, or set `amp=False` to validate in float32 "
    "too.",
    "AMP105:copy": "Do not convert the model that trains: Ultralytics validates its averaged copy in float32.",
    "AMP105": "Set `amp=False` to train and validate in float32. With AMP on, Ultralytics validates in torch's default "
    "autocast dtype for the device (float16 on " + ("CUDA, also with `amp='bf16'`)." if _NAMES_DTYPES else "CUDA)."),
    "AMP107": "Train with `amp=False`.",
    "AMP107:float16": "Train with `amp='fp16'`, or with `amp=False`." if _NAMES_DTYPES else "Train with `amp=False`.",
    "AMP107:bfloat16": "Train with `amp='bf16'`, or with `amp=False`." if _NAMES_DTYPES else "Train with `amp=False`.",
    "AMP108": "If the line is Ultralytics' own, update Ultralytics.",
    "AMP201": "Do not call `.half()` on the model that trains. `YOLO('last.pt')` loads a checkpoint, which is saved in "
    "float16, as float32.",
    "AMP202": "Load weights with `YOLO('last.pt')` or `model.load('last.pt')`: both convert checkpoints to float32.",
    "AMP203:low-precision-parameter": "",
    "AMP203:low-precision-model": "Do not call `.half()` or `.to(dtype)` on the model or on a layer: Ultralytics "
    "gives it float32 images, also with `amp=False`.",
    "AMP203": "Set `amp=False` to run model and loss in float32; otherwise both run in the trainer's autocast region.",
    "AMP205": "Or train with `amp=False`, so that your own modules get only float32.",
    "AMP211": "Do not call `.half()` on the model or on `trainer.ema.ema`, which Ultralytics makes in float32 from a "
    "float32 model; `trainer.save_model()` converts a copy.",
    "AMP301": "Keep the `trainer.scaler` that Ultralytics makes"
    + (", or train with `amp='bf16'`, which needs none." if _NAMES_DTYPES else "."),
    "AMP302": "Do not replace `trainer.scaler` in a callback or your own trainer: "
    + ("`amp='bf16'` switches it off." if _NAMES_DTYPES else "`amp=False` switches it off."),
    "AMP306": "Leave `unscale_`, `step` and `update` of `trainer.scaler` to `trainer.optimizer_step()`, which also "
    "clips: override that method whole, or none of it.",
    "AMP309": "Build the optimizer in `trainer.build_optimizer(model, ...)` from the `model` that it gets.",
    "AMP401": "Do not write to the input in your own module: a layer of the yaml passes the same tensor to every layer "
    "that names it in its `from`. For dropout in a classification model use an `nn.Dropout()`: `dropout=` sets its "
    "`p`.",
    "AMP403": "Keep what your own module writes in a buffer: Ultralytics makes all floating-point parameters require "
    "grad, except those that `freeze=` names.",
    "AMP404": "Do not write to the input in your own block: inside `C2f` and similar modules it is a `chunk` view.",
    "AMP405": "Leave the step to `trainer.optimizer_step()`, which runs after backward. Step an optimizer of your own "
    "in the event `on_train_batch_end`.",
    "AMP406:parameters": "",
    "AMP406": "When `self.training`, make anew or `.clone()` what your own module keeps from validation and prediction "
    "(a cached grid, say): they run under `torch.inference_mode()`.",
    "AMP408": "Return the first value of `model.loss(batch)` with its graph, and detach only the second: Ultralytics "
    "runs backward itself, once per batch, on the first.",
    "AMP501": "Set `AmpCheck(numerics='stop')`, which stops at such a step before the weights change."
    + (" Otherwise Ultralytics goes back to `last.pt` after the epoch, without a word about the cause." * _RECOVERS),
    "AMP502:bfloat16": "Or train with `amp='bf16'`, in which this batch is finite, or with `amp=False`."
    if _NAMES_DTYPES
    else "Or train with `amp=False`.",
    "AMP502:float32": "Or train with `amp=False`.",
    "AMP503:bfloat16": "Or train with `amp='bf16'`, in which this batch is finite, or with `amp=False`."
    if _NAMES_DTYPES
    else "Or train with `amp=False`.",
    "AMP503:float32": "Or train with `amp=False`.",
    "AMP510": "Look at these images and labels in the `train` split of `data=`.",
    "AMP511": "Set `AmpCheck(numerics='stop')`, and load weights from before, `YOLO('best.pt')`."
    + (" Do not go by the checkpoints that follow: Ultralytics replaces NaN in them by 0." * _CLEANS),
    "AMP512": "Set `AmpCheck(numerics='guard')` to see why, or train with "
    + ("`amp='bf16'` or `amp=False`." if _NAMES_DTYPES else "`amp=False`."),
    "AMP515": "Lower `lr0=`, or raise `warmup_epochs=`; Ultralytics clips gradients to a norm of 10 already.",
    "AMP410": (
        "Set `inplace = False` on the `act` next to the hook: Ultralytics makes the activations of its models in place."
        if _IN_PLACE
        else "Check the `activation:` of the yaml: the `act` of an Ultralytics `Conv` is out of place by default, but "
        "one named there may not be."
    ),
}
