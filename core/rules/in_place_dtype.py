from collections.abc import Iterator

from ampcheck.rules._crash import crash_message, data_of, sites_of, told_by
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Failure, Trace


@rule(
    "AMP209",
    Severity.ERROR,
    fix="Cast the source to the dtype of the target: `target[index] = source.to(target.dtype)`.",
    needs=("failure",),
)
def in_place_dtype(trace: Trace) -> Iterator[Evidence]:
    """The target and the source of an in-place, index or scatter write have different dtypes.

    What it does
        Names both tensors of the write that failed, their dtypes, and the line or module that made each.

    Why is this bad?
        Autocast never casts for an operation that writes into a tensor the program made: what layers return is low
        precision, what `torch.zeros` makes is float32. The step dies at the first such write.

    Example
        ```python
        out = torch.zeros(len(mask), 4)
        out[mask] = self.head(x)  # bfloat16 under autocast
        ```

    Use instead
        ```python
        out = torch.zeros(len(mask), 4)
        out[mask] = self.head(x).to(out.dtype)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocast-op-reference
    """
    failure = trace.failure
    if failure is None or failure.kind != "in-place-dtype":
        return
    yield Evidence(
        crash_message(failure, "the target and the source of a write differ in dtype"),
        module=failure.module,
        sites=sites_of(failure),
        data={**data_of(failure), "reason": "in-place-or-out", **told_by(failure)},
        fix=_fix(failure),
    )


def _fix(failure: Failure) -> str | None:
    operands = failure.fields["operands"]
    if len({operand["dtype"] for operand in operands}) < 2 or not all("device" in operand for operand in operands):
        return None
    target = operands[0]
    sources = [operand for operand in operands[1:] if operand["dtype"] != target["dtype"]]
    if target["dtype"] not in ("float16", "bfloat16", "float32", "float64"):
        return f"Make {target['name']} a floating tensor, or do without the in-place write."
    source = sources[0]["name"]
    return (
        f"Cast the source, `{source}.to({target['name']}.dtype)`, or make {target['name']} with `dtype={source}.dtype`."
    )
