from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._crash import crash_message, data_of, function_fix, sites_of, told_by
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Failure, Trace


@rule(
    "AMP207",
    Severity.ERROR,
    fix="Cast the operands to float32 for this one call, `op(x.float())`, and the result back where that is wanted.",
    needs=("failure",),
)
def op_not_implemented(trace: Trace) -> Iterator[Evidence]:
    """An operation has no kernel for float16 or bfloat16.

    What it does
        Names the operation, the operands that reached it in low precision, and what made them so.

    Why is this bad?
        The step dies. Decompositions, distances, many extension kernels and non-maximum suppression exist in float32
        and float64 only, and where autocast does not know them nobody casts.

    Example
        ```python
        cost = torch.cdist(boxes, targets, p=1)  # boxes are float16
        ```

    Use instead
        ```python
        cost = torch.cdist(boxes.float(), targets.float(), p=1)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocast-op-reference
    """
    failure = trace.failure
    if failure is None or failure.kind != "op-not-implemented":
        return
    op = failure.fields.get("op", "an operation")
    dtype = next(iter(failure.fields.get("dtypes", ())), "low precision")
    function = failure.fields.get("function")
    yield Evidence(
        crash_message(failure, f"{op} has no kernel for {dtype}"),
        module=failure.module,
        sites=sites_of(failure, function["site"] if function else None),
        data={**data_of(failure), **({"reason": "custom-function"} if function else {}), **told_by(failure)},
        fix=_fix(failure),
    )


def _fix(failure: Failure) -> str | None:
    function = failure.fields.get("function")
    operands = failure.fields["operands"]
    device = next((operand["device"].partition(":")[0] for operand in operands if operand.get("device")), "cuda")
    if function is not None and function["method"] == "forward":
        return function_fix(function, device)
    own = [operand for operand in operands if operand.get("device") and "library" not in operand]
    low = [operand["name"] for operand in own if operand["dtype"] in LOW_PRECISION]
    if not low:
        return None
    casts = ", ".join(f"`{name}.float()`" for name in dict.fromkeys(low))
    return f"Cast to float32 for this call: {casts}; and the result back, `.to(...)`, where low precision is wanted."
