"""Remedies in Ultralytics' words, for the version that is installed."""

from __future__ import annotations

from collections.abc import Mapping

from ultralytics.cfg import get_cfg
from ultralytics.utils import torch_utils


def _names_dtypes() -> bool:
    """Whether ``amp=`` takes the names of dtypes, and therefore not every text. Older versions take any text, or
    none."""
    try:
        get_cfg(overrides={"amp": "no dtype"})
    except (TypeError, ValueError) as refused:
        return isinstance(refused, ValueError)
    return False


_NAMES_DTYPES = _names_dtypes()
_IN_PLACE = "inplace" in torch_utils.initialize_weights.__code__.co_names

FIXES: Mapping[str, str] = {
    "AMP101": "Ultralytics uses AMP only on an accelerator that passes its AMP check (log lines that begin with "
    "`AMP:`): train on one (`device=0`), or say `amp=False` if float32 is what you want.",
    "AMP102": "`torch.autocast` takes `device_type=`; the helper that takes `device=` is "
    "`ultralytics.utils.torch_utils.autocast(enabled, device='cuda')`.",
    "AMP103": "Open regions of your own for `batch['img'].device.type`: Ultralytics moves the model to `device=`.",
    "AMP104": "Ask for the dtype by name: `amp='bf16'` or `amp='fp16'`."
    if _NAMES_DTYPES
    else "This version has no setting for the dtype: `amp=True` takes torch's default for the device.",
    "AMP105": "Ultralytics validates in torch's default autocast dtype for the device whenever AMP is on (float16 on "
    + ("CUDA, also with `amp='bf16'`)" if _NAMES_DTYPES else "CUDA)")
    + "; `amp=False` trains and validates in float32.",
    "AMP107": "Train with `amp=False`" + (" or, on a GPU, with `amp='fp16'`." if _NAMES_DTYPES else "."),
    "AMP108": "Where the line is Ultralytics' own, an update of Ultralytics replaces it.",
    "AMP201": "Do not call `.half()` on the model that trains; `YOLO('last.pt')` loads a checkpoint, which is saved in "
    "float16, as float32.",
    "AMP202": "Load weights with `YOLO('last.pt')` or `model.load('last.pt')`: both convert checkpoints to float32.",
    "AMP203": "Model and loss run in the trainer's autocast region; `amp=False` runs both in float32.",
    "AMP205": "Or train with `amp=False`, under which a module of your own gets float32 alone.",
    "AMP211": "`trainer.ema.ema` is made in float32 from a float32 model: do not call `.half()` on either; "
    "`trainer.save_model()` converts a copy.",
    "AMP301": "Keep the `trainer.scaler` that Ultralytics makes"
    + (", or train with `amp='bf16'`, which needs none." if _NAMES_DTYPES else "."),
    "AMP302": ("`amp='bf16'` switches `trainer.scaler` off" if _NAMES_DTYPES else "`amp=False` switches it off")
    + ": do not replace it in a callback or a trainer of your own.",
    "AMP309": "Build the optimizer in `trainer.build_optimizer(model, ...)` from the model that it is given.",
    "AMP401": "A layer of the yaml hands the same tensor to every layer that names it in its `from`: a module of your "
    "own must not write to its input. For dropout in a classification model give it an `nn.Dropout()`: `dropout=` sets "
    "its `p`.",
    "AMP403": "Ultralytics makes all floating-point parameters require grad but those that `freeze=` names: keep what "
    "a module of your own writes itself in a buffer.",
    "AMP404": "Inside `C2f` and its kin the blocks get `chunk` views: a block of your own must not write to its input.",
    "AMP405": "Leave the step to `trainer.optimizer_step()`, which runs after backward; an optimizer of your own may "
    "step in the event `on_train_batch_end`.",
    "AMP406": "Validation and prediction run under `torch.inference_mode()`: what a module of your own keeps from them "
    "(a cached grid, say) is to be made anew, or cloned, when `self.training`.",
    "AMP408": "Ultralytics runs backward itself, once a batch, on the first of the two values that `model.loss(batch)` "
    "returns: return that with its graph, and detach only the second.",
    "AMP410": (
        "Ultralytics makes the activations of its models in place: set `inplace = False` on the `act` next to the hook."
        if _IN_PLACE
        else "`act` of an Ultralytics `Conv` is out of place by default; one that `activation:` in the yaml names "
        "need not be."
    ),
}
