"""Fixes in MMEngine's settings."""

from __future__ import annotations

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "AMP101": "Set `type='AmpOptimWrapper'` in `optim_wrapper` (`--amp` of MMDetection's tools/train.py does this); "
    "MMEngine ignores the `fp16 = dict(...)` of MMCV 1.x. In your own `train_step`, run the forward inside `with "
    "optim_wrapper.optim_context(self):`.",
    "AMP102": "Use `mmengine.runner.autocast(dtype=...)`, which takes the device that MMEngine trains on, so you can "
    "leave `device_type` out.",
    "AMP103": "Use `mmengine.runner.autocast(dtype=...)`, which opens the region for `mmengine.device.get_device()`, "
    "and keep the model on that device.",
    "AMP104": "Set `dtype='float16'` or `dtype='bfloat16'` in `optim_wrapper`, whichever you want; without it "
    "`AmpOptimWrapper` takes the device's default.",
    "AMP105:only-training": "Set `fp16=True` in `val_cfg` and `test_cfg` to evaluate under autocast too. It takes the "
    "device's default dtype, whatever `optim_wrapper.dtype` is.",
    "AMP105:only-evaluation": "Remove `fp16=True` from `val_cfg` and `test_cfg`, or train under autocast too: "
    "`optim_wrapper = dict(type='AmpOptimWrapper', ...)`.",
    "AMP105:dtype": "Remove `fp16=True` from `val_cfg` and `test_cfg`, which takes the device's default dtype, or set "
    "that dtype in `optim_wrapper`.",
    "AMP106": "Keep only the forward and the losses inside `with optim_wrapper.optim_context(self):`, and call "
    "`optim_wrapper.update_params(loss)` after it.",
    "AMP107:float16": "Set `dtype='float16'` in `optim_wrapper`, or `type='OptimWrapper'` to train in float32.",
    "AMP107:bfloat16": "Set `dtype='bfloat16'` in `optim_wrapper`, or `type='OptimWrapper'` to train in float32.",
    "AMP107:float32": "Set `type='OptimWrapper'` in `optim_wrapper`.",
    "AMP108": "Use `mmengine.runner.autocast` in your own code, and the scaler of `AmpOptimWrapper`.",
    "AMP109": "Open your own region with `mmengine.runner.autocast(cache_enabled=False)`.",
    "AMP201": "Keep the model in float32 when you build the Runner, and let `optim_wrapper = "
    "dict(type='AmpOptimWrapper', dtype=...)` do the casting.",
    "AMP203:evaluation": "Set `fp16=True` in `val_cfg` and `test_cfg` (they evaluate without autocast by default), or "
    "cast in the model.",
    "AMP203:low-precision-parameter": "",
    "AMP203:low-precision-model": "Convert images and other inputs where the model is entered, `inputs.to(dtype)` in "
    "`forward()`: MMEngine converts neither, and `data_preprocessor` passes float32.",
    "AMP203": "In your own `train_step`, compute inside `with optim_wrapper.optim_context(self):`, which is the only "
    "autocast there; inside `mmengine.runner.autocast(enabled=False)`, pass `.float()` inputs.",
    "AMP204": "Use `data_preprocessor = dict(type='ImgDataPreprocessor', ...)`, which passes image batches on as "
    "float32, or cast at the end of the transform that makes them float64.",
    "AMP205": "Or call it inside `with mmengine.runner.autocast(enabled=False):` on `.float()` inputs.",
    "AMP210": "Compute this loss on `.float()` inputs inside `with mmengine.runner.autocast(enabled=False):`.",
    "AMP211": "Keep the model in float32 when you build the Runner: `EMAHook` averages in the dtypes that it finds "
    "when training begins.",
    "AMP301": "Set `optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', ...)`, and remove "
    "`loss_scale=dict(enabled=False)`, which turns scaling off.",
    "AMP302": "Set `loss_scale=dict(enabled=False)` in `optim_wrapper`: `AmpOptimWrapper` always makes a scaler, and "
    "this switches it off.",
    "AMP305": "Set `clip_grad=dict(max_norm=...)` in `optim_wrapper`, which clips after unscaling, and call "
    "`optim_wrapper.update_params(loss)`.",
    "AMP306": "Leave `unscale_`, `step` and `update` to `optim_wrapper.step()`; the scaler is "
    "`optim_wrapper.loss_scaler`. Clip by `clip_grad=dict(max_norm=...)` in `optim_wrapper`.",
    "AMP309": "Pass `optim_wrapper` as a config, `dict(type=..., optimizer=dict(...))`: the Runner then builds the "
    "optimizer from the model that it trains.",
    "AMP401": "If an activation writes, set `inplace=False` in the `act_cfg` of its block: "
    "`act_cfg=dict(type='ReLU', inplace=False)`. If a neck or head runs `x += y`, write `x = x + y`.",
    "AMP404": "If a neck or head writes to the outputs of `split`, `chunk` or `unbind`, make new tensors: `outs[i] = "
    "outs[i] + x`.",
    "AMP405": "In your own `train_step`, call `optim_wrapper[...].backward(loss)` for every loss before the first "
    "`step()`, or run the forward again after `update_params()`, which steps.",
    "AMP407": "Set `broadcast_buffers=False` in `model_wrapper_cfg = dict(type='MMDistributedDataParallel')`; "
    "without a `model_wrapper_cfg` the Runner does this itself.",
    "AMP408": "Call `update_params(loss)`, which runs backward, once, on the sum that `parse_losses()` makes of the "
    "losses. Let `loss()` return tensors with their graph, without `.item()` or `.detach()`.",
    "AMP501": "Set `dict(type='AmpCheckHook', numerics='stop')`, which stops at such a step before the weights change.",
    "AMP502:bfloat16": "Or set `dtype='bfloat16'` in `optim_wrapper`, in which this batch is finite. For one place, "
    "use `with mmengine.runner.autocast(enabled=False):` on `.float()` inputs.",
    "AMP502:float32": "Use `with mmengine.runner.autocast(enabled=False):` on `.float()` inputs.",
    "AMP503:bfloat16": "Or set `dtype='bfloat16'` in `optim_wrapper`, in which this batch is finite.",
    "AMP508": "Build the model in float32, and set `type='AmpOptimWrapper'` and `dtype='bfloat16'` in `optim_wrapper`.",
    "AMP509": "Build the model in float32, and set `type='AmpOptimWrapper'` in `optim_wrapper`, or "
    "`optimizer=dict(..., eps=1e-4)`.",
    "AMP510": "Look at these samples in the dataset of `train_dataloader`.",
    "AMP511": "Set `dict(type='AmpCheckHook', numerics='stop')`, and set `load_from` to a checkpoint from before: "
    "`CheckpointHook` saves what is broken like any other.",
    "AMP512": "Set `dict(type='AmpCheckHook', numerics='guard')` to see why. `loss_scale=dict(init_scale=...)` in "
    "`optim_wrapper` sets where the scale starts.",
    "AMP515": "Set `clip_grad=dict(max_norm=...)` in `optim_wrapper`, and warm up with "
    "`param_scheduler = [dict(type='LinearLR', ...), ...]`.",
    "AMP410": "Set `inplace=False` in the `act_cfg` of the block that has the hook: `act_cfg=dict(type='ReLU', "
    "inplace=False)`.",
}
