from collections.abc import Iterator

from ampcheck.rules._numbers import (
    acquitted,
    compared,
    data_of,
    finite_elsewhere,
    in_float32,
    op_of,
    reached,
    sites_of,
    told_as,
    where,
)
from ampcheck.rules._words import place
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP503",
    Severity.ERROR,
    fix="Compute it in float32, or use a number that the dtype holds: `torch.finfo(x.dtype).eps`.",
    needs=("numbers",),
)
def constant_lost(trace: Trace) -> Iterator[Evidence]:
    """A small constant is 0 in the op's dtype, and what it should have protected is not finite.

    What it does
        Follows Python numbers that float16 or bfloat16 round to 0 (`1e-8`), or to 1 (`1 - 1e-4`), to the op that failed
        because of it.

    Why is this bad?
        The smallest number of float16 is 6e-8. `x / (y + 1e-8)` is then `x / y`, and 0 / 0 where `y` is 0.

    Example
        ```python
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        ```

    Use instead
        ```python
        x = x.float()
        x = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        ```

    References
        - https://pytorch.org/docs/stable/type_info.html#torch-finfo
    """
    for found, origin in told_as(trace, "AMP503"):
        constant = origin.constant
        if constant is None:
            continue
        yield Evidence(
            f"{acquitted(found)}{constant.value:g} is {constant.becomes:g} in {constant.dtype}{place(constant.site)}, "
            f"so that {op_of(origin)} is not finite{where(found)}; {reached(found)}.{compared(found)}",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
            fix=in_float32(trace, found, origin),
            situation=finite_elsewhere(found),
        )
