from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FirstStepSkipped, ScalerCall, Trace


@rule(
    "AMP310",
    Severity.INFO,
    fix="Leave it: the scaler lowers its scale and training goes on. To keep the schedule in step, call "
    "`scheduler.step()` only if `scaler.get_scale()` did not fall.",
)
def first_step_skipped(trace: Trace) -> Iterator[Evidence]:
    """The scaler skipped the first optimizer step, which makes `lr_scheduler.step()` warn.

    What it does
        Checks in the watched steps whether the scaler skipped the first `optimizer.step()` because the gradients
        overflowed at the initial loss scale. Also recognises the scheduler's warning if warnings are raised as errors.

    Why is this bad?
        It is not: with an initial scale of 65536 the first steps often overflow, and the scale falls until they no
        longer do. But `lr_scheduler.step()` then warns that it was called before `optimizer.step()`, which sends people
        looking for a bug in the order of their calls, and the schedule runs ahead by the skipped steps.

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
        seen = "AmpCheck did not see whether the scaler skipped it"
        if skipped is not None:
            seen = f"the scaler skipped it{place(skipped.site)}"
        yield Evidence(
            f"The scheduler stepped before the optimizer's first step; {seen}.",
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
    """The first `step` of the watched step, if the scaler skipped it."""
    calls = trace.training.scaling if trace.training is not None else ()
    first = next((call for call in calls if call.op == "step"), None)
    return first if first is not None and first.skipped else None
