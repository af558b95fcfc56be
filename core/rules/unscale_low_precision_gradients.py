from collections.abc import Iterator, Sequence

from ampcheck.rules._stale import statement
from ampcheck.rules._words import count, place, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import LowPrecisionGradients, ModelInfo, Site, Trace


@rule(
    "AMP303",
    Severity.ERROR,
    fix="Keep the trainable parameters float32 (`model.float()`, no `.half()`) and let autocast cast them; or train in "
    "true float16 or bfloat16 without a `GradScaler`.",
    needs=("failure",),
)
def unscale_low_precision_gradients(trace: Trace) -> Iterator[Evidence]:
    """The gradient scaler got float16 gradients, which it refuses to unscale.

    What it does
        Counts and names every parameter of the optimizer with a float16 gradient, and says whether it was float16 when
        the fit began or became float16 later (in a validation or a resume that calls `.half()`). Names the line that
        cast them, if the source has exactly one such line.

    Why is this bad?
        A float16 parameter has a float16 gradient, and dividing it by the loss scale loses what scaling should save, so
        the scaler raises at its first unscale. Mixed precision needs float32 parameters.

    Example
        ```python
        model = Net().half()
        scaler = torch.amp.GradScaler("cpu")
        ```

    Use instead
        ```python
        model = Net()
        scaler = torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/notes/amp_examples.html
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, LowPrecisionGradients):
        return
    facts, names = failure.facts, failure.facts.parameters
    if not names:
        yield Evidence("The scaler got float16 gradients.", sites=failure.sites[:1])
        return
    one = len(names) == 1
    yield Evidence(
        f"{count(len(names), 'parameter')} of the {facts.optimized} in {facts.optimizer} "
        f"{'has a' if one else 'have'} float16 gradient{'' if one else 's'}: "
        f"{some(names)}.{_since_when(trace.model, names)}{_cast(facts.cast)}",
        module=_common(names),
        sites=places([*failure.sites[:1], facts.cast]),
        data={"count": len(names), "optimized": facts.optimized, "parameters": list(names)},
        fix=_fix(trace.model, names),
    )


def _changed(model: ModelInfo | None, names: Sequence[str]) -> list[str] | None:
    """The parameters that were float32 at fit start, or ``None`` if that is not known."""
    if model is None:
        return None
    dtypes = {tensor.name: tensor.dtype for tensor in model.parameters}
    known = [name for name in names if name in dtypes]
    return [name for name in known if dtypes[name] == "float32"] if known else None


def _since_when(model: ModelInfo | None, names: Sequence[str]) -> str:
    changed = _changed(model, names)
    if changed is None:
        return ""
    if not changed:
        return " They were float16 when the fit began."
    which = "They were"
    if len(changed) < len(names):
        which = f"{some(changed)} {'was' if len(changed) == 1 else 'were'}"
    return f" {which} float32 when the fit began: something cast the model during the fit."


def _cast(site: Site | None) -> str:
    return f" `{statement(site)}`{place(site)} casts them to float16." if site is not None else ""


def _fix(model: ModelInfo | None, names: Sequence[str]) -> str | None:
    if _changed(model, names):
        return (
            "Find the `.half()` that runs during the fit (in a validation, an averaged copy, a resume) and call it on "
            "a copy of the model, or call `model.float()` before training goes on."
        )
    return None


def _common(names: Sequence[str]) -> str | None:
    """The module that holds all of them, if there is one."""
    owners = {name.rpartition(".")[0] for name in names}
    return owners.pop() if len(owners) == 1 and "[" not in names[0] else None
