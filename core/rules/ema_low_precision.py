from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._words import share, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP211",
    Severity.WARNING,
    fix="Make the averaged copy in float32, `copy.deepcopy(model).float()`, and cast it for evaluation only.",
    needs=("averaged",),
)
def ema_low_precision(trace: Trace) -> Iterator[Evidence]:
    """An averaged copy of the weights is kept in float16 or bfloat16.

    What it does
        Counts the float16 and bfloat16 parameters of the averaged copy.

    Why is this bad?
        An update moves the average by a tiny part of the difference: 0.0001 of it with a decay of 0.9999. float16 has
        11 bits of precision and bfloat16 has 8, so almost every update is rounded away, and the average stays at its
        first value.

    Example
        ```python
        averaged = copy.deepcopy(model).half()
        ```

    Use instead
        ```python
        averaged = copy.deepcopy(model).float()
        ```

    References
        - https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema
        - https://github.com/d8ahazard/sd_dreambooth_extension/pull/1417
    """
    assert trace.averaged is not None
    parameters = trace.averaged.parameters
    for dtype in sorted(LOW_PRECISION):
        names = [parameter.name for parameter in parameters if parameter.dtype == dtype]
        if names:
            yield Evidence(
                f"{share(len(names), len(parameters), 'parameter of the averaged copy')} {dtype}: {some(names)}.",
                data={"dtype": dtype, "parameters": names},
            )
