from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._facts import optimized, scaling, trainable, wants_mixed
from ampcheck.rules._words import share, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP201",
    Severity.WARNING,
    fix="Keep the trainable parameters in float32: remove the `.half()` or `.to(dtype)` that cast them, or call "
    "`model.float()` before you create the optimizer.",
    needs=("model",),
)
def low_precision_parameters(trace: Trace) -> Iterator[Evidence]:
    """Trainable parameters are float16 or bfloat16 under mixed precision.

    What it does
        Counts the trainable float16 and bfloat16 parameters if mixed precision was asked for. float16 parameters under
        an enabled gradient scaler are an error. Skips frozen parameters.

    Why is this bad?
        Mixed precision keeps the weights in float32 and lets autocast cast them. float16 parameters have float16
        gradients, and the scaler refuses them: `ValueError: Attempting to unscale FP16 gradients.` Without a scaler
        training goes on, but updates smaller than the rounding of the weights are lost.

    Example
        ```python
        model = Net().cuda().half()
        scaler = torch.amp.GradScaler("cuda")
        ```

    Use instead
        ```python
        model = Net().cuda()
        scaler = torch.amp.GradScaler("cuda")
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.autocast
        - https://github.com/pytorch/pytorch/issues/74739
        - https://github.com/huggingface/diffusers/issues/6442
    """
    assert trace.model is not None
    if not wants_mixed(trace):
        return
    parameters = trainable(trace.model)
    for dtype in sorted(LOW_PRECISION):
        names = [parameter.name for parameter in parameters if parameter.dtype == dtype]
        # The scaler of sharded training takes float16 gradients, and optimizers that unscale them themselves do.
        takes_float16 = trace.scaler is not None and trace.scaler.type == "ShardedGradScaler"
        holders = [optimizer for optimizer in trace.optimizers if optimizer.dtypes.get(dtype)]
        takes_float16 = takes_float16 or (bool(holders) and all(optimizer.unscales for optimizer in holders))
        refused = dtype == "float16" and scaling(trace) and not takes_float16 and optimized(trace, dtype)
        if names:
            end = ", and the gradient scaler refuses to unscale their gradients" if refused else ""
            yield Evidence(
                f"{share(len(names), len(parameters), 'trainable parameter')} {dtype} under mixed precision{end}: "
                f"{some(names)}.",
                module=names[0].rpartition(".")[0] or None if len(names) == 1 else None,
                data={"dtype": dtype, "parameters": names, "trainable": len(parameters)},
                severity=Severity.ERROR if refused else None,
            )
