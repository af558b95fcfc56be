"""Remedies in Lightning's words."""

from __future__ import annotations

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "AMP101": "`Trainer(precision='16-mixed')` and `'bf16-mixed'` run `training_step` under autocast: drop "
    "`autocast(enabled=False)` from it. A precision plugin of your own must enter autocast in `forward_context()`.",
    "AMP102": "Drop the `autocast`: `Trainer(precision='16-mixed')` or `'bf16-mixed'` already runs `training_step` "
    "under it. Or write `torch.autocast(self.device.type)`.",
    "AMP103": "Give the precision with `Trainer(precision=...)`, which takes the device from `accelerator`, in place "
    "of `plugins=[MixedPrecision(..., device=...)]` or of an `autocast` in the module.",
    "AMP104": "Ask for the one you mean, `Trainer(precision='16-mixed')` or `Trainer(precision='bf16-mixed')`, and "
    "drop `autocast` from the module.",
    "AMP105": "`Trainer(precision=...)` covers `validation_step`, `test_step` and `predict_step` as it does "
    "`training_step`: drop `autocast` from the module.",
    "AMP106": "Return the loss from `training_step` and Lightning runs backward outside. Under manual optimization "
    "wrap `self.manual_backward(loss)` in `torch.autocast(self.device.type, enabled=False)`.",
    "AMP107": "Choose another `Trainer(precision=...)`: '16-mixed', 'bf16-mixed' or '32-true'.",
    "AMP108": "`Trainer(precision='16-mixed')` makes region and scaler itself; a scaler of your own goes into "
    "`MixedPrecision('16-mixed', 'cuda', scaler=torch.amp.GradScaler('cuda'))`.",
    "AMP109": "Drop `autocast` from the module; if it has none, update Lightning: since 2.6 its own region keeps no "
    "weights that were cast under `no_grad`.",
    "AMP201": "Leave the model in float32 for `Trainer(precision='16-mixed')` or `'bf16-mixed'`; for half-precision "
    "parameters drop `.half()` and ask for `Trainer(precision='bf16-true')`: under '16-true' the `eps` of AdamW is 0, "
    "and its first step may give NaN.",
    "AMP202": "Drop `.half()` and `.to(dtype)` from the module: `Trainer(precision=...)` converts the whole model, "
    "or nothing of it.",
    "AMP203": "Autocast covers `training_step` and the other `*_step` methods alone: give it `.float()` where the "
    "module turns it off, and what other hooks compute a `torch.autocast(self.device.type)` of its own. Under "
    "`Trainer(precision='bf16-true')` or `'16-true'` make tensors with `dtype=self.dtype`.",
    "AMP204": "Cast batches in `on_before_batch_transfer()`, or ask for float64 by `Trainer(precision='64-true')`.",
    "AMP205": "Or let it have operands of one dtype, without autocast: `Trainer(precision='bf16-true')` or "
    "`'32-true'`.",
    "AMP208": "`Trainer(precision='bf16-true')` converts buffers and all parameters.",
    "AMP211": "Averaging callbacks copy the dtypes of the model: `Trainer(precision='16-mixed')` and `'bf16-mixed'` "
    "keep them float32.",
    "AMP301": "`Trainer(precision='16-mixed')` brings its scaler, and under manual optimization "
    "`self.manual_backward(loss)` applies it. Or choose `Trainer(precision='bf16-mixed')`, which needs none.",
    "AMP302": "`Trainer(precision='bf16-mixed')` and `'32-true'` use no scaler: drop the one the module makes.",
    "AMP303": "Leave the model in float32 for `Trainer(precision='16-mixed')`, or ask for "
    "`Trainer(precision='bf16-true')`, which has no scaler.",
    "AMP305": "Give `Trainer(gradient_clip_val=...)`, or clip in `on_before_optimizer_step()`, which is called after "
    "unscaling.",
    "AMP308": "Drop `fused=True` from the optimizer or `gradient_clip_val` from the trainer, or choose "
    "`Trainer(precision='bf16-true')`.",
    "AMP309": "Build the optimizer from `self.parameters()` in `configure_optimizers()`, and layers before it, in "
    "`__init__()` or `configure_model()`.",
    "AMP311": "Return the loss from `training_step`, or call `self.manual_backward(loss)` in place of "
    "`loss.backward()`.",
    "AMP401": "Lightning runs backward after `training_step` has returned: write out of place until then. Under manual "
    "optimization a write may come after `self.manual_backward(loss)`.",
    "AMP403": "Leave the parameters to `optimizer.step()`; what you change by hand belongs inside `with "
    "torch.no_grad():`, in `on_train_batch_end()`.",
    "AMP405": "Under manual optimization call every `self.manual_backward(...)` that uses a forward pass before the "
    "`optimizer.step()`, or run that forward pass again after it; `toggle_optimizer()` does not change this.",
    "AMP406": "Lightning evaluates in inference mode: `.clone()` in `training_step` what `validation_step` has made, "
    "or set `Trainer(inference_mode=False)`.",
    "AMP407": "Give `Trainer(strategy=DDPStrategy(broadcast_buffers=False))`, or call the module once in "
    "`training_step`, on both batches together.",
    "AMP408": "`training_step` has to return a loss with its graph, and `.detach()` what it keeps for the next batch. "
    "Under manual optimization only the last `self.manual_backward(loss)` of a graph comes without "
    "`retain_graph=True`.",
    "AMP410": "Look at the gradients of parameters in `on_after_backward()` or `on_before_optimizer_step()`, which "
    "need no hook on a module.",
}
