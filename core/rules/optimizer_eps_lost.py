from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP509",
    Severity.ERROR,
    fix="Keep the parameters in float32 (under autocast if you want speed), or pass `eps=1e-4`.",
    needs=("model",),
)
def optimizer_eps_lost(trace: Trace) -> Iterator[Evidence]:
    """The optimizer's `eps` is 0 in the dtype of its parameters.

    What it does
        Rounds `eps` of each group to the dtype of the group's parameters, in which PyTorch's optimizers keep their
        state.

    Why is this bad?
        Adam divides by the root of the second moment plus `eps`. In float16 the default, 1e-8, is 0: an element whose
        gradient is 0, or whose square is, becomes 0 / 0, and the weights are NaN after the first step.

    Example
        ```python
        optimizer = torch.optim.AdamW(model.half().parameters(), lr=1e-3)
        ```

    Use instead
        ```python
        optimizer = torch.optim.AdamW(model.half().parameters(), lr=1e-3, eps=1e-4)
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.optim.AdamW.html
        - https://pytorch.org/docs/stable/type_info.html#torch-finfo
    """
    for optimizer in trace.optimizers:
        for eps, dtype in optimizer.eps_lost:
            yield Evidence(
                f"`eps={eps:g}` of {optimizer.type} is 0 in {dtype}, the dtype of its parameters.",
                data={"optimizer": optimizer.type, "eps": eps, "dtype": dtype},
            )
