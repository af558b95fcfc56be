"""Remedies in MMEngine's settings."""

from __future__ import annotations

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "AMP101": "Set `type='AmpOptimWrapper'` in `optim_wrapper` (`--amp` of MMDetection's tools/train.py does); the "
    "`fp16 = dict(...)` of MMCV 1.x is read by nothing. In a `train_step` of your own run the forward inside "
    "`with optim_wrapper.optim_context(self):`.",
    "AMP102": "Use `mmengine.runner.autocast(dtype=...)`: it opens the region for the device that MMEngine trains "
    "on, so that `device_type` can be left out.",
    "AMP103": "Use `mmengine.runner.autocast(dtype=...)`, which opens the region for `mmengine.device.get_device()`"
    ", and keep the model on that device.",
    "AMP104": "Set `dtype='float16'` or `dtype='bfloat16'` in `optim_wrapper` to the one you want; without it "
    "`AmpOptimWrapper` takes the device's default.",
    "AMP105": "Set `fp16=True` in `val_cfg` and `test_cfg` to evaluate under autocast too. It takes the device's "
    "default dtype, whatever `optim_wrapper.dtype` is.",
    "AMP106": "Keep only the forward and the losses inside `with optim_wrapper.optim_context(self):`, and call "
    "`optim_wrapper.update_params(loss)` after it.",
    "AMP107": "Set the other of `dtype='float16'` and `dtype='bfloat16'` in `optim_wrapper`, or "
    "`type='OptimWrapper'` to train in float32.",
    "AMP108": "Use `mmengine.runner.autocast` in code of your own, and the scaler of `AmpOptimWrapper`.",
    "AMP109": "Open your own region by `mmengine.runner.autocast(cache_enabled=False)`.",
    "AMP201": "Leave the model in float32 when the Runner is built and let `optim_wrapper = "
    "dict(type='AmpOptimWrapper', dtype=...)` do the casting.",
    "AMP203": "In a `train_step` of your own compute inside `with optim_wrapper.optim_context(self):`, which is "
    "the only autocast there is; where `mmengine.runner.autocast(enabled=False)` is meant, feed it `.float()`.",
    "AMP204": "`data_preprocessor = dict(type='ImgDataPreprocessor', ...)` hands image batches on as float32; a "
    "transform that makes float64 of them can also cast at its end.",
    "AMP205": "Or call it inside `with mmengine.runner.autocast(enabled=False):` on `.float()` inputs.",
    "AMP210": "Compute this loss on `.float()` inputs inside `with mmengine.runner.autocast(enabled=False):`.",
    "AMP211": "`EMAHook` averages in the dtypes it finds when training begins: leave the model in float32 when "
    "the Runner is built.",
    "AMP301": "Let `optim_wrapper` be `dict(type='AmpOptimWrapper', loss_scale='dynamic')`; "
    "`loss_scale=dict(enabled=False)` is what turns scaling off.",
    "AMP302": "`AmpOptimWrapper` always makes a scaler; set `loss_scale=dict(enabled=False)` in `optim_wrapper` "
    "to switch it off.",
    "AMP309": "Give `optim_wrapper` as a config, `dict(type=..., optimizer=dict(...))`: the Runner then builds the "
    "optimizer from the model that it trains.",
    "AMP401": "Where an activation writes, set `inplace=False` in the `act_cfg` of its block, "
    "`act_cfg=dict(type='ReLU', inplace=False)`; where a neck or head says `x += y`, write `x = x + y`.",
    "AMP404": "Where a neck or head writes to parts of what `split`, `chunk` or `unbind` gave, make new ones: "
    "`outs[i] = outs[i] + x`.",
    "AMP405": "In a `train_step` of your own call `optim_wrapper[...].backward(loss)` for every loss before the "
    "first `step()`, or run the forward again after `update_params()`, which steps.",
    "AMP407": "Set `broadcast_buffers=False` in `model_wrapper_cfg = dict(type='MMDistributedDataParallel')`; "
    "without a `model_wrapper_cfg` the Runner does so itself.",
    "AMP408": "`update_params(loss)` runs backward: call it once, on the sum that `parse_losses()` makes of the "
    "losses, and let `loss()` return tensors with their graph, not `.item()` or `.detach()`.",
    "AMP410": "Set `inplace=False` in the `act_cfg` of the block that carries the hook, "
    "`act_cfg=dict(type='ReLU', inplace=False)`.",
}
