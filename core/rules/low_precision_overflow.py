from collections.abc import Iterator

from ampcheck.rules._numbers import (
    GROWN,
    acquitted,
    compared,
    data_of,
    finite_elsewhere,
    in_float32,
    op_of,
    overflowed,
    reached,
    sites_of,
    told_as,
    where,
)
from ampcheck.rules._words import sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP502",
    Severity.ERROR,
    fix="Compute it in float32: `with torch.autocast(device_type, enabled=False): y = f(x.float())`, or use bfloat16.",
    needs=("numbers",),
)
def low_precision_overflow(trace: Trace) -> Iterator[Evidence]:
    """An op overflowed float16 or bfloat16, and the loss or a gradient is not finite.

    What it does
        Computes the op alone again in float64, from the same operands, and compares the true value with the largest
        number of the op's dtype. Then it replays the batch in float32 and in bfloat16.

    Why is this bad?
        float16 ends at 65504. Sums over pixels, squared distances, areas and attention scores reach that, and one
        infinity makes the loss NaN.

    Example
        ```python
        scores = q @ k.transpose(-2, -1) / math.sqrt(d)
        ```

    Use instead
        ```python
        scores = (q / math.sqrt(d)) @ k.transpose(-2, -1)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
        - https://pytorch.org/docs/stable/type_info.html#torch-finfo
    """
    for found, origin in told_as(trace, "AMP502"):
        float32 = found.outcomes.get("float32")
        diverges = float32 is not None and float32.finite is False
        yield Evidence(
            f"{acquitted(found)}{sentence(op_of(origin))} overflowed {origin.dtype}{where(found)}{overflowed(origin)}; "
            f"{reached(found)}.{compared(found)}",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
            fix=GROWN if diverges else in_float32(trace, found, origin),
            situation=finite_elsewhere(found),
        )
