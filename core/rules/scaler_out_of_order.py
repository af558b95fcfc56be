from collections.abc import Iterator

from ampcheck.rules._words import place, places, sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Disorder, ScalerCall, ScalerOrder, Trace

_WORDS: dict[Disorder, tuple[str, str]] = {
    "unscaled-twice": (
        "`unscale_()` ran twice for {optimizer} with no `update()` in between",
        "Call `scaler.unscale_(optimizer)` once per step, and `scaler.update()` in every iteration that unscales, even "
        "if it skips the optimizer's step.",
    ),
    "unscaled-late": (
        "`unscale_()` ran for {optimizer} after `step()`",
        "Call `scaler.unscale_(optimizer)` before `scaler.step(optimizer)`.",
    ),
    "stepped-twice": (
        "`step()` ran twice for {optimizer} with no `update()` in between",
        "Call `scaler.update()` once per iteration, after its steps.",
    ),
    "never-scaled": (
        "the scaler was used for {optimizer} before it had scaled any loss",
        "Backpropagate the scaled loss: `scaler.scale(loss).backward()`.",
    ),
    "early-update": (
        "`update()` ran before any optimizer was stepped or unscaled",
        "Call `scaler.step(optimizer)` before `scaler.update()`.",
    ),
}


@rule(
    "AMP306",
    Severity.ERROR,
    fix="Per iteration: `scaler.scale(loss).backward()`, `scaler.unscale_(optimizer)` at most once, "
    "`scaler.step(optimizer)`, `scaler.update()`.",
    needs=("failure",),
)
def scaler_out_of_order(trace: Trace) -> Iterator[Evidence]:
    """The gradient scaler's methods were called in the wrong order.

    What it does
        Says which call came twice, too late or too early, for which optimizer and, if the step was watched, where the
        earlier call was.

    Why is this bad?
        The scaler keeps a state per optimizer and iteration: scaled, unscaled, stepped. `update()` ends the iteration.
        Unscaling twice would divide the gradients twice; stepping twice would use stale checks.

    Example
        ```python
        scaler.unscale_(optimizer)
        if clip_grad_norm_(model.parameters(), 1.0).isnan():
            continue  # no update(): the next unscale_() raises
        ```

    Use instead
        ```python
        scaler.unscale_(optimizer)
        if not clip_grad_norm_(model.parameters(), 1.0).isnan():
            scaler.step(optimizer)
        scaler.update()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, ScalerOrder):
        return
    reason = failure.facts.reason
    words, fix = _WORDS[reason]
    message = words.format(optimizer=failure.facts.optimizer or "the optimizer")
    first = _first(trace, reason)
    yield Evidence(
        f"{sentence(message)}{_after(first)}.",
        sites=places([*failure.sites[:1], first.site if first else None]),
        data={"reason": reason},
        fix=fix,
    )


def _first(trace: Trace, reason: Disorder) -> ScalerCall | None:
    """The earlier of the two calls that must not follow each other, if the failed step was watched."""
    ops: dict[Disorder, str] = {"unscaled-twice": "unscale", "unscaled-late": "step", "stepped-twice": "step"}
    op = ops.get(reason)
    calls = trace.training.scaling if trace.training is not None else ()
    if calls and calls[-1].op == "update":
        return None
    return next((call for call in reversed(calls) if call.op == op), None)


def _after(first: ScalerCall | None) -> str:
    return f"; the earlier call is{place(first.site)}" if first is not None and first.site is not None else ""
