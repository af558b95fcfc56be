from collections.abc import Iterator

from ampcheck.rules._numbers import acquitted, compared, data_of, op_of, reached, sites_of, told_as, where
from ampcheck.rules._words import place, sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP505",
    Severity.ERROR,
    fix="Leave at least one key in each row: `mask = mask & ~mask.all(-1, keepdim=True)`, where true is masked.",
    needs=("numbers",),
)
def fully_masked_softmax(trace: Trace) -> Iterator[Evidence]:
    """A softmax over a row in which everything is masked gave NaN.

    What it does
        Goes back from the NaN to a softmax or an attention whose operand holds infinities that the code wrote, and
        names the line that wrote them.

    Why is this bad?
        The softmax of a row of minus infinities is 0 / 0. It poisons the batch: 0 times NaN is NaN, also behind a mask.

    Example
        ```python
        scores = scores.masked_fill(mask, float("-inf")).softmax(-1)
        ```

    Use instead
        ```python
        mask = mask & ~mask.all(-1, keepdim=True)
        scores = scores.masked_fill(mask, float("-inf")).softmax(-1)
        ```

    References
        - https://github.com/pytorch/pytorch/issues/41508
        - https://pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
    """
    for found, origin in told_as(trace, "AMP505"):
        yield Evidence(
            f"{acquitted(found)}{sentence(op_of(origin))} gave NaN{where(found)}: in some of its rows everything is "
            f"masked{place(origin.fill)}; {reached(found)}.{compared(found)}",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
        )
