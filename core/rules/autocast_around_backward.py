from collections.abc import Iterator

from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP106",
    Severity.WARNING,
    fix="End the autocast region after the loss is computed, and call `backward()` outside it.",
    needs=("training", "uncompiled"),
)
def autocast_around_backward(trace: Trace) -> Iterator[Evidence]:
    """Backward ran inside the autocast region.

    What it does
        Looks at autocast where `Tensor.backward` is called in the watched training step. It is information where no
        region of the step was entered by the user's own code: the host runs backward so.

    Why is this bad?
        Backward operations run in the dtype of their forward operations without any autocast. With autocast on,
        operations in backward are cast once more; on CUDA, where backward runs in a thread of its own, bfloat16
        regions have run them in float16, with its much smaller range.

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
            f"backward() was called {count(total, 'time')} with {calls[0].autocast} in force{place(calls[0].site)}.",
            sites=places(call.site for call in calls),
            data={"calls": total, "dtype": calls[0].autocast.dtype},
            severity=None if own or not trace.training.regions else Severity.INFO,
        )
