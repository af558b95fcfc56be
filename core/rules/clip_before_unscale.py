from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP305",
    Severity.WARNING,
    fix="Call `scaler.unscale_(optimizer)` before clipping.",
    needs=("training",),
)
def clip_before_unscale(trace: Trace) -> Iterator[Evidence]:
    """Gradients were clipped while they were still multiplied by the loss scale.

    What it does
        Looks in the watched step for gradients of an optimizer that were clipped after a scaled backward, with no
        `unscale_(optimizer)` in between and a `scaler.step` of that optimizer afterwards.

    Why is this bad?
        The gradients are 65536 times too large when they are clipped to norm 1, and the scaler divides them by 65536
        afterwards: every update is tens of thousands of times too small. The loss stays flat, and nothing says why.

    Example
        ```python
        scaler.scale(loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        ```

    Use instead
        ```python
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        ```

    References
        - https://pytorch.org/docs/stable/notes/amp_examples.html#gradient-clipping
    """
    assert trace.training is not None
    calls = trace.training.scaling
    seen = set()
    for index, call in enumerate(calls):
        if call.op != "clip" or not call.scaled or call.site in seen:
            continue
        stepped = {one for later in calls[index:] if later.op == "step" for one in later.optimizers}
        if not stepped.intersection(call.optimizers):
            continue
        seen.add(call.site)
        backward = next((c for c in reversed(calls[:index]) if c.op == "backward" and c.scaled), None)
        yield Evidence(
            f"Gradients were clipped{place(call.site)} while they were still multiplied by the loss scale.",
            sites=places([call.site, backward.site if backward else None]),
            data={"reason": "no-unscale-before-clip"},
        )
