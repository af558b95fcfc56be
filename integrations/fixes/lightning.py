"""Fixes in Lightning's words."""

from __future__ import annotations

from collections.abc import Mapping

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
    "AMP107": "Set another `Trainer(precision=...)`: '16-mixed', 'bf16-mixed' or '32-true'.",
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
    "turns it off, and run the code of other hooks inside `torch.autocast(self.device.type)`. Under "
    "`Trainer(precision='bf16-true')` or `'16-true'` create tensors with `dtype=self.dtype`.",
    "AMP204": "Cast batches in `on_before_batch_transfer()`, or ask for float64 with `Trainer(precision='64-true')`.",
    "AMP205": "Or run it without autocast, on operands of one dtype: `Trainer(precision='bf16-true')` or `'32-true'`.",
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
    "AMP406": "Call `.clone()` in `training_step` on what `validation_step` made (Lightning evaluates in inference "
    "mode), or set `Trainer(inference_mode=False)`.",
    "AMP407": "Set `Trainer(strategy=DDPStrategy(broadcast_buffers=False))`, or call the module once in "
    "`training_step`, on both batches together.",
    "AMP408": "Return a loss with its graph from `training_step`, and `.detach()` what you keep for the next batch. "
    "Under manual optimization, pass `retain_graph=True` to every `self.manual_backward(loss)` of a graph but the "
    "last.",
    "AMP410": "Read the gradients of parameters in `on_after_backward()` or `on_before_optimizer_step()`, which need "
    "no hook on a module.",
}
