from collections.abc import Iterator

from ampcheck.rules._operation import crash_message, data_of, sites_of
from ampcheck.rules._words import cast_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import FailedOperation, NoNumpyDtype, Trace


@rule(
    "AMP212",
    Severity.ERROR,
    fix="Cast to float32 first, because NumPy has no bfloat16: `x.float().numpy()`.",
    needs=("failure",),
)
def no_numpy_dtype(trace: Trace) -> Iterator[Evidence]:
    """A bfloat16 tensor was passed to NumPy, which has no such dtype.

    What it does
        Names the tensor, its shape, and the module or line that made it bfloat16.

    Why is this bad?
        Metrics, loggers and matchers that go through NumPy work in float16 and fail in bfloat16.

    Example
        ```python
        predictions = model(images).detach().cpu().numpy()
        ```

    Use instead
        ```python
        predictions = model(images).detach().float().cpu().numpy()
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.Tensor.numpy.html
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, NoNumpyDtype):
        return
    operation = failure.facts.operation
    yield Evidence(
        crash_message(failure, operation, "a bfloat16 tensor was passed to NumPy"),
        module=failure.module,
        sites=sites_of(failure, operation),
        data=data_of(operation),
        fix=_fix(operation),
    )


def _fix(operation: FailedOperation) -> str | None:
    tensors = [operand for operand in operation.operands if operand.device]
    expression = operation.expression or ""
    if len(tensors) != 1:
        # The cast comes right before, so that what the line calls in between stays.
        receiver = expression.removesuffix(".numpy()")
        return f"Write `{receiver}.float().numpy()`." if receiver != expression else None
    name = tensors[0].name
    if expression.startswith(f"{name}."):
        # What the line calls in between, `detach()` or `cpu()`, stays.
        return f"Write `{name}.float(){expression.removeprefix(name)}`."
    return f"Cast to float32 first: {cast_of(tensors[0], '.float()')}."
