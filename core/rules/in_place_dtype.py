from collections.abc import Iterator

from ampcheck.precision import FLOATING
from ampcheck.rules._operation import crash_message, data_of, sites_of, told_by
from ampcheck.rules._words import cast_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FailedOperand, FailedOperation, InPlaceDtype, Trace


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
        Autocast never casts for an operation that writes into an existing tensor: layers return low precision, but
        `torch.zeros` makes float32. The step fails at the first such write.

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
    if failure is None or not isinstance(failure.facts, InPlaceDtype):
        return
    operation = failure.facts.operation
    yield Evidence(
        crash_message(failure, operation, "the target and the source of a write have different dtypes"),
        module=failure.module,
        sites=sites_of(failure, operation),
        data=data_of(operation, "in-place-or-out"),
        fix=_fix(operation),
        told_by=told_by(operation),
    )


def _fix(operation: FailedOperation) -> str | None:
    operands = operation.operands
    if len({operand.dtype for operand in operands}) < 2 or any(operand.device is None for operand in operands):
        return None
    target = operands[0]
    source = next(operand for operand in operands if operand.dtype != target.dtype)
    if target.dtype not in FLOATING:
        return f"Make {target.name} a floating-point tensor, or use the out-of-place operation."
    like_target, like_source = _dtype_of(target), _dtype_of(source)
    casting = cast_of(source, f".to({like_target})")
    return f"Cast the source, {casting}, or make {target.name} with `dtype={like_source}`."


def _dtype_of(operand: FailedOperand) -> str:
    named = not operand.stored and operand.name.replace(".", "").isidentifier()
    return f"{operand.name}.dtype" if named else f"torch.{operand.dtype}"
