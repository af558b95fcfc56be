from collections.abc import Iterator

from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP106",
    Severity.WARNING,
    fix="End the `with torch.autocast(...):` block after the loss, and call `loss.backward()` outside it.",
    needs=("training", "uncompiled"),
)
def autocast_around_backward(trace: Trace) -> Iterator[Evidence]:
    """Backward ran inside the autocast region.

    What it does
        Checks whether autocast is on when `Tensor.backward` is called in the watched training step. It is information
        if the user's own code entered no region in the step: then the host runs backward this way.

    Why is this bad?
        Backward operations already run in the dtype of their forward operations. Autocast would cast them a second
        time. On CUDA, where backward runs in its own thread, bfloat16 regions have run them in float16, which has a
        much smaller range.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
            loss.backward()
        ```

    Use instead
        ```python
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.autocast
        - https://github.com/pytorch/pytorch/issues/105682
    """
    assert trace.training is not None
    calls = [op for op in trace.training.ops if op.op == "backward" and op.autocast.enabled]
    if calls:
        own = any(region.enabled and region.by_user for region in trace.training.regions)
        total = sum(call.count for call in calls)
        yield Evidence(
            f"backward() was called {count(total, 'time')} under {calls[0].autocast}{place(calls[0].site)}.",
            sites=places(call.site for call in calls),
            data={"calls": total, "dtype": calls[0].autocast.dtype},
            severity=None if own or not trace.training.regions else Severity.INFO,
        )
