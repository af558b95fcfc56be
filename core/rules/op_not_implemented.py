from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._operation import crash_message, data_of, function_fix, no_kernel, sites_of, told_by
from ampcheck.rules._words import cast_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FailedOperation, OpNotImplemented, Trace


@rule(
    "AMP207",
    Severity.ERROR,
    fix="Cast the operands to float32 for this one call, `op(x.float())`, and the result back if you need it in low "
    "precision.",
    needs=("failure",),
)
def op_not_implemented(trace: Trace) -> Iterator[Evidence]:
    """An operation has no kernel for float16 or bfloat16.

    What it does
        Names the operation, the operands that reached it in low precision, and what made them low precision.

    Why is this bad?
        The step fails. Decompositions, distances, many extension kernels and non-maximum suppression exist only in
        float32 and float64, and autocast casts nothing for an operation that it has no rule for.

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
    if failure is None or not isinstance(failure.facts, OpNotImplemented):
        return
    operation, function = failure.facts.operation, failure.facts.operation.function
    yield Evidence(
        crash_message(failure, operation, no_kernel(operation)),
        module=failure.module,
        sites=sites_of(failure, operation, function.site if function is not None else None),
        data=data_of(operation, "custom-function" if function is not None else None),
        fix=_fix(operation),
        told_by=told_by(operation),
    )


def _fix(operation: FailedOperation) -> str | None:
    function, operands = operation.function, operation.operands
    if function is not None and function.method == "forward":
        return function_fix(function, next((o.device_type for o in operands if o.device_type), "cuda"))
    low = [
        cast_of(operand, ".float()")
        for operand in operands
        if operand.device and not operand.library and operand.dtype in LOW_PRECISION
    ]
    if not low:
        return None
    casts = ", ".join(dict.fromkeys(low))
    return f"Cast to float32 for this call: {casts}. Cast the result back with `.to(...)` if you need low precision."
