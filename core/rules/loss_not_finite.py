from collections.abc import Iterator

from ampcheck.rules._numbers import (
    GROWN,
    acquitted,
    code_of,
    compared,
    data_of,
    op_of,
    overflowed,
    reached,
    sites_of,
    where,
)
from ampcheck.rules._words import sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import NonFinite, Trace


@rule(
    "AMP501",
    Severity.ERROR,
    fix="Stop at the first such step, with the weights intact: `numerics='stop'`.",
    needs=("numbers",),
)
def loss_not_finite(trace: Trace) -> Iterator[Evidence]:
    """A loss or a gradient is NaN or infinite.

    What it does
        Looks at losses and gradients where training stops anyway, or at each step (`numerics="guard"`). It replays the
        failing batch and goes back from the loss to the op whose operands were finite. Where the cause is known,
        AMP502 to AMP505, AMP510 and AMP511 tell it instead.

    Why is this bad?
        Without a gradient scaler, the next optimizer step makes all weights NaN. With one, the step is skipped, and the
        batch is lost.

    Example
        ```python
        loss = (output * 1e30 * 1e30).mean()
        ```

    Use instead
        ```python
        loss = (output * 10).mean()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
        - https://pytorch.org/docs/stable/notes/numerical_accuracy.html#extremal-values
    """
    for found in trace.numbers or ():
        if code_of(found) == "AMP501":
            origin = found.origin
            yield Evidence(
                f"{acquitted(found)}{_what(found)}{compared(found)}",
                module=origin.module if origin is not None else None,
                sites=sites_of(origin) if origin is not None else (),
                data=data_of(found, origin),
                fix=_fix(found),
            )


def _what(found: NonFinite) -> str:
    origin = found.origin
    if origin is None:
        said = f": {found.said}" if found.said else ""
        return f"{sentence(reached(found))}{where(found)}{said}, so its origin is not known."
    if origin.kind == "overflow":
        return (
            f"{sentence(op_of(origin))} overflowed {origin.dtype}{where(found)}{overflowed(origin)}; {reached(found)}."
        )
    return (
        f"{sentence(op_of(origin))} gave values that are not finite from operands that were{where(found)}; "
        f"{reached(found)}. PyTorch has no float64 kernel to say why."
    )


def _fix(found: NonFinite) -> str | None:
    return GROWN if found.origin is not None and found.origin.kind == "overflow" else None
