"""Fixes in Lightning's words."""

from __future__ import annotations

from collections.abc import Mapping

MANUAL_OPTIMIZATION: Mapping[str, str] = {
    "AMP305": "Clip in `on_before_optimizer_step(optimizer)`, which Lightning calls after unscaling, in "
    "`optimizer.step()`; under manual optimization `Trainer(gradient_clip_val=...)` raises.",
}
"""What holds instead under manual optimization."""

FIXES: Mapping[str, str] = {
    "AMP101": "Remove `autocast(enabled=False)` from `training_step`, which `Trainer(precision='16-mixed')` and "
    "`'bf16-mixed'` run under autocast. A precision plugin of your own must enter autocast in `forward_context()`.",
    "AMP102": "Remove the `autocast`: `Trainer(precision='16-mixed')` and `'bf16-mixed'` already run `training_step` "
    "under it. Or write `torch.autocast(self.device.type)`.",
    "AMP103": "Set `Trainer(precision=...)`, which takes the device from `accelerator`, and remove "
    "`plugins=[MixedPrecision(..., device=...)]` or the `autocast` in the module.",
    "AMP104": "Set the dtype you want, `Trainer(precision='16-mixed')` or `Trainer(precision='bf16-mixed')`, and "
    "remove `autocast` from the module.",
    "AMP105": "Remove `autocast` from the module: `Trainer(precision=...)` covers `validation_step`, `test_step` and "
    "`predict_step` as well as `training_step`.",
    "AMP106": "Return the loss from `training_step`, and Lightning runs backward outside autocast. Under manual "
    "optimization, wrap `self.manual_backward(loss)` in `torch.autocast(self.device.type, enabled=False)`.",
    "AMP107:float16": "Set `Trainer(precision='16-mixed')`, or `'32-true'` to train in float32.",
    "AMP107:bfloat16": "Set `Trainer(precision='bf16-mixed')`, or `'32-true'` to train in float32.",
    "AMP107:float32": "Set `Trainer(precision='32-true')`.",
    "AMP108": "Use `Trainer(precision='16-mixed')`, which makes region and scaler itself. Pass a scaler of your own "
    "as `MixedPrecision('16-mixed', 'cuda', scaler=torch.amp.GradScaler('cuda'))`.",
    "AMP109": "Remove `autocast` from the module. If it has none, update Lightning: since 2.6 its own region does "
    "not keep weights that were cast under `no_grad`.",
    "AMP201": "Keep the model in float32 for `Trainer(precision='16-mixed')` or `'bf16-mixed'`. For half-precision "
    "parameters remove `.half()` and set `Trainer(precision='bf16-true')`: under '16-true' the `eps` of AdamW is 0, "
    "and its first step may give NaN.",
    "AMP202": "Remove `.half()` and `.to(dtype)` from the module: `Trainer(precision=...)` converts the whole model "
    "or nothing.",
    "AMP203": "Autocast covers only `training_step` and the other `*_step` methods: call `.float()` where the module "
    "turns it off, and run the code of other hooks inside `torch.autocast(self.device.type)`.",
    "AMP203:low-precision-parameter": "",
    "AMP203:low-precision-model": "Under `Trainer(precision='bf16-true')` and `'16-true'` create tensors with "
    "`dtype=self.dtype`, also in `validation_step`; Lightning converts only the batch.",
    "AMP204": "Cast batches in `on_before_batch_transfer()`, or ask for float64 with `Trainer(precision='64-true')`.",
    "AMP205": "Or run it without autocast, on operands of one dtype: `Trainer(precision='bf16-true')` or `'32-true'`.",
    "AMP208:autocast": "",
    "AMP208": "Or set `Trainer(precision='bf16-true')`, which converts buffers and all parameters.",
    "AMP211": "Keep the model in float32 with `Trainer(precision='16-mixed')` or `'bf16-mixed'`: averaging callbacks "
    "copy its dtypes.",
    "AMP301": "Set `Trainer(precision='16-mixed')`, which brings its scaler (under manual optimization "
    "`self.manual_backward(loss)` applies it), or `Trainer(precision='bf16-mixed')`, which needs none.",
    "AMP302": "Remove the scaler that the module makes: `Trainer(precision='bf16-mixed')` and `'32-true'` use none.",
    "AMP303": "Keep the model in float32 for `Trainer(precision='16-mixed')`, or set "
    "`Trainer(precision='bf16-true')`, which has no scaler.",
    "AMP305": "Set `Trainer(gradient_clip_val=...)`, or clip in `on_before_optimizer_step()`, which runs after "
    "unscaling.",
    "AMP306": "Lightning unscales, steps and updates its scaler, `self.trainer.precision_plugin.scaler`, in "
    "`optimizer.step()` (called for you under automatic optimization): leave `unscale_`, `step` and `update` to it, "
    "and use unscaled gradients in `on_before_optimizer_step()`.",
    "AMP308": "Remove `fused=True` from the optimizer or `gradient_clip_val` from the trainer, or set "
    "`Trainer(precision='bf16-true')`.",
    "AMP309": "Build the optimizer from `self.parameters()` in `configure_optimizers()`, and build layers before "
    "that, in `__init__()` or `configure_model()`.",
    "AMP311": "Return the loss from `training_step`, or call `self.manual_backward(loss)` instead of "
    "`loss.backward()`.",
    "AMP401": "Do not write in place before `training_step` returns: Lightning runs backward after it. Under manual "
    "optimization, write after `self.manual_backward(loss)`.",
    "AMP403": "Leave the parameters to `optimizer.step()`, or change them inside `with torch.no_grad():` in "
    "`on_train_batch_end()`.",
    "AMP405": "Under manual optimization, call every `self.manual_backward(...)` that uses a forward pass before "
    "`optimizer.step()`, or run that forward pass again after it; `toggle_optimizer()` does not change this.",
    "AMP406:parameters": "",
    "AMP406": "If `trainer.validate()`, `test()` or `predict()` made it, which run in inference mode (validation in "
    "`fit()` does not), set `Trainer(inference_mode=False)`, or call `.clone()` on it in `training_step`.",
    "AMP407": "Set `Trainer(strategy=DDPStrategy(broadcast_buffers=False))`, or call the module once in "
    "`training_step`, on both batches together.",
    "AMP408": "Return a loss with its graph from `training_step`, and `.detach()` what you keep for the next batch. "
    "Under manual optimization, pass `retain_graph=True` to every `self.manual_backward(loss)` of a graph but the "
    "last.",
    "AMP501": "Set `AmpCheck(numerics='stop')`, which stops at such a step before the weights change. Lightning itself "
    "goes on: no setting of `Trainer` checks the loss.",
    "AMP502:bfloat16": "Or set `Trainer(precision='bf16-mixed')`, in which this batch is finite.",
    "AMP503:bfloat16": "Or set `Trainer(precision='bf16-mixed')`, in which this batch is finite.",
    "AMP508": "Set `Trainer(precision='bf16-mixed')` instead of 'bf16-true', and leave the module in float32.",
    "AMP509": "Set `Trainer(precision='bf16-mixed')` or `'16-mixed'` instead of '16-true', and leave the module in "
    "float32.",
    "AMP510": "Look at these samples in the `DataLoader` that you pass to `trainer.fit()`.",
    "AMP511": "Set `AmpCheck(numerics='stop')`, and go back to a checkpoint from before, "
    "`trainer.fit(..., ckpt_path=...)`: Lightning saves what is broken like any other.",
    "AMP512": "Set `AmpCheck(numerics='guard')` to see why. The scaler is `trainer.precision_plugin.scaler`; pass one "
    "with another start as `MixedPrecision('16-mixed', 'cuda', scaler=torch.amp.GradScaler('cuda', init_scale=...))`.",
    "AMP515": "Set `Trainer(gradient_clip_val=...)`, and warm the learning rate up in `configure_optimizers()`.",
    "AMP410": "Read the gradients of parameters in `on_after_backward()` or `on_before_optimizer_step()`, which need "
    "no hook on a module.",
}
