from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP311",
    Severity.WARNING,
    fix="Backpropagate the scaled loss: `scaler.scale(loss).backward()`.",
    needs=("training",),
)
def unscaled_backward(trace: Trace) -> Iterator[Evidence]:
    """Backward ran on an unscaled loss, into parameters that the scaler steps.

    What it does
        Looks in the watched step for a backward whose loss never went through `scaler.scale`, into parameters of an
        optimizer that the scaler unscales or steps later in the step.

    Why is this bad?
        The scaler divides these gradients by the loss scale anyway: this loss counts for a 65536th of what it should.
        If it is the only loss, training stands still.

    Example
        ```python
        loss.backward()
        scaler.step(optimizer)
        ```

    Use instead
        ```python
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    assert trace.training is not None
    calls = trace.training.scaling
    seen = set()
    for index, call in enumerate(calls):
        if call.op != "backward" or call.scaled is not False or call.site in seen:
            continue
        own = set(call.optimizers)
        divided = [c for c in calls[index:] if c.op in ("step", "unscale") and own.intersection(c.optimizers)]
        if not divided:
            continue
        seen.add(call.site)
        yield Evidence(
            f"The loss backpropagated{place(call.site)} was not scaled, but the scaler divides its gradients by the "
            f"loss scale{place(divided[0].site)}.",
            sites=places([call.site, divided[0].site]),
            data={"reason": "never-scaled"},
        )
