from collections.abc import Iterator, Sequence

from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import MissingGradients, Trace, WithoutGradient

_WHY: dict[WithoutGradient, str] = {
    "frozen": "{are} frozen (`requires_grad=False`)",
    "not-the-models": "{are} not the model's (the optimizer was built before the model was moved, wrapped or rebuilt)",
    "no-gradient": "got no gradient (the loss does not depend on {them}, or was detached)",
}


@rule(
    "AMP304",
    Severity.ERROR,
    fix="Build the optimizer from the model's trainable parameters after moving and wrapping the model, and call "
    "`scaler.step(optimizer)` only after a backward that reached them.",
    needs=("failure",),
)
def no_inf_checks(trace: Trace) -> Iterator[Evidence]:
    """`scaler.step()` was called for an optimizer whose parameters have no gradients.

    What it does
        Sorts the optimizer's parameters by the reason why they have no gradient: they are frozen, they are not the
        model's (the optimizer was built from another or an earlier copy), or no backward reached them. Also says
        whether other parameters got gradients.

    Why is this bad?
        The step raises; otherwise it would train nothing. PyTorch's message names neither the parameters nor the
        reason.

    Example
        ```python
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model = Net()  # rebuilt: the optimizer still holds the old one's parameters
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        ```

    Use instead
        ```python
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, MissingGradients):
        return
    facts = failure.facts
    without, elsewhere = facts.without_gradient, facts.gradients_elsewhere
    if not without:
        yield Evidence("No parameter of the optimizer has a gradient.", sites=failure.sites[:1])
        return
    parts = [_part(why, names) for why, names in without.items()]
    tail = (
        f" {count(elsewhere, 'parameter')} of the model that the optimizer does not hold got gradients."
        if elsewhere
        else ""
    )
    reason = next(iter(without)) if len(without) == 1 else "several"
    yield Evidence(
        f"None of the {facts.optimized} parameters in {facts.optimizer} has a gradient: {'; '.join(parts)}.{tail}",
        sites=failure.sites[:1],
        data={
            "reason": reason,
            "optimized": facts.optimized,
            "without_gradient": {why: list(names) for why, names in without.items()},
            "gradients_elsewhere": elsewhere,
        },
        fix=_fix(reason, elsewhere=elsewhere > 0),
    )


def _part(why: WithoutGradient, names: Sequence[str]) -> str:
    one = len(names) == 1
    words = _WHY[why].format(are="is" if one else "are", them="it" if one else "them")
    return f"{some(names) if '[' not in names[0] else len(names)} {words}"


def _fix(reason: str, *, elsewhere: bool) -> str | None:
    if reason == "not-the-models":
        return "Build the optimizer from `model.parameters()` after the model is moved, wrapped or rebuilt."
    if reason == "frozen":
        return (
            "Call `requires_grad_(True)` on the parameters to train, or build the optimizer from parameters that "
            "require grad."
        )
    if reason == "no-gradient" and not elsewhere:
        return (
            "Skip backward and `scaler.step` for a batch whose loss depends on no parameter, or find where the loss is "
            "detached."
        )
    if reason == "no-gradient":
        return (
            "Call `scaler.step` for this optimizer only where the loss depends on its parameters, or make the loss "
            "depend on them."
        )
    return None
