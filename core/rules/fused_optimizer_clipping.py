from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FusedOptimizerClipping, Trace


@rule(
    "AMP308",
    Severity.ERROR,
    fix="Build the optimizer with `fused=False`, or train without gradient clipping.",
    needs=("failure",),
)
def fused_optimizer_clipping(trace: Trace) -> Iterator[Evidence]:
    """The host refuses to clip gradients for an optimizer that unscales them itself.

    What it does
        Recognises the host's error, and names the optimizers of the run.

    Why is this bad?
        A fused optimizer divides the gradients by the loss scale inside its own step. Clipping needs unscaled gradients
        before that step, and unscaling them twice would make them too small by a factor of the scale.

    Example
        ```python
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # with float16 loss scaling and clipping
        ```

    Use instead
        ```python
        optimizer = torch.optim.AdamW(model.parameters(), fused=False)
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.optim.AdamW.html
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, FusedOptimizerClipping):
        return
    names = ", ".join(dict.fromkeys(optimizer.type for optimizer in trace.optimizers)) or "The optimizer"
    yield Evidence(
        f"{names} unscales the gradients inside its own step (it is fused), so they cannot be clipped before it.",
        sites=failure.sites[:1],
        data={"optimizers": [optimizer.type for optimizer in trace.optimizers]},
    )
