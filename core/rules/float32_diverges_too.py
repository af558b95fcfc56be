from collections.abc import Iterator

from ampcheck.rules._numbers import code_of, data_of, where
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP515",
    Severity.INFO,
    fix="Look at the learning rate, its warm-up and gradient clipping, and at the loss of the steps before.",
    needs=("numbers",),
)
def float32_diverges_too(trace: Trace) -> Iterator[Evidence]:
    """The batch overflows in float32 too: weights or data, not precision.

    What it does
        Replays the failing batch in float32, without autocast and with the loss scale 1.

    Why is this bad?
        Turning mixed precision off would not help, and the time to find that out is lost.

    Example
        ```python
        optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
        ```

    Use instead
        ```python
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
    """
    for found in trace.numbers or ():
        outcome = found.outcomes.get("float32")
        if outcome is not None and outcome.finite is False and code_of(found) in ("AMP501", "AMP502"):
            yield Evidence(
                f"In float32, without autocast, the batch{where(found)} is not finite either: the weights, the "
                "learning rate or the data are the reason.",
                data=data_of(found, None),
            )
