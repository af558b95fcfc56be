from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FirstStepSkipped, ScalerCall, Trace


@rule(
    "AMP310",
    Severity.INFO,
    fix="Leave it: the scale is lowered and training goes on. To keep the schedule in step, call `scheduler.step()` "
    "only where `scaler.get_scale()` did not fall.",
)
def first_step_skipped(trace: Trace) -> Iterator[Evidence]:
    """The scaler skipped the optimizer's first step, and a scheduler stepped all the same warns of it.

    What it does
        Sees in the watched steps that the scaler left the first `optimizer.step()` out, because the gradients
        overflowed at the initial loss scale; or recognises the scheduler's warning where warnings are raised.

    Why is this bad?
        It is not: with an initial scale of 65536 the first steps often overflow, and the scale falls until they do
        not. But `lr_scheduler.step()` then warns of being called before `optimizer.step()`, which sends people to look
        for a fault in the order of their calls, and the schedule runs ahead by the steps that were skipped.

    Example
        ```python
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        ```

    Use instead
        ```python
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            scheduler.step()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    failure, skipped = trace.failure, _skipped(trace)
    if failure is not None and isinstance(failure.facts, FirstStepSkipped):
        seen = "whether the scaler skipped it was not seen"
        if skipped is not None:
            seen = f"the scaler skipped it{place(skipped.site)}"
        yield Evidence(
            f"The scheduler was stepped before the optimizer's first step; {seen}.",
            sites=places([*failure.sites[:1], skipped.site if skipped else None]),
            data={"skipped": True if skipped else None},
        )
    elif skipped is not None:
        yield Evidence(
            f"The scaler skipped the first optimizer step{place(skipped.site)}: gradients overflowed at the initial "
            "loss scale.",
            sites=places([skipped.site]),
            data={"skipped": True},
        )


def _skipped(trace: Trace) -> ScalerCall | None:
    """The first step of the first watched step, where the scaler left it out."""
    calls = trace.training.scaling if trace.training is not None else ()
    first = next((call for call in calls if call.op == "step"), None)
    return first if first is not None and first.skipped else None
