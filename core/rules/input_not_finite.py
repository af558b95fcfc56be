from collections.abc import Iterator

from ampcheck.rules._numbers import acquitted, data_of, reached, sites_of, told_as, where
from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP510",
    Severity.ERROR,
    fix="Find these samples in the data, and repair them or leave them out: a check in the dataset, "
    "`assert torch.isfinite(x).all()`, names them.",
    needs=("numbers",),
)
def input_not_finite(trace: Trace) -> Iterator[Evidence]:
    """The batch itself holds NaN or infinities, and the loss or a gradient is not finite.

    What it does
        Goes back from the loss to a value that no op of the step made and that is no parameter or buffer, and names
        the variable and the samples.

    Why is this bad?
        One such sample makes the loss of its batch NaN, in any precision.

    Example
        ```python
        x[0, 0] = float("nan")
        loss = criterion(model(x), y)
        ```

    Use instead
        ```python
        x = x[torch.isfinite(x).flatten(1).all(1)]
        loss = criterion(model(x), y[: len(x)])
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.isfinite.html
    """
    for found, origin in told_as(trace, "AMP510"):
        name = origin.given.name if origin.given is not None else None
        samples = f", in sample {some(map(str, origin.samples))}" if origin.samples else ""
        yield Evidence(
            f"{acquitted(found)}The input{f' {name}' if name else ''} is not finite{where(found)}: "
            f"{count(origin.count, 'element')} of {origin.size}{samples}; {reached(found)}.",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
        )
