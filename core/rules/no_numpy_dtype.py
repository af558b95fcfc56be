from collections.abc import Iterator

from ampcheck.rules._operation import crash_message, data_of, sites_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import NoNumpyDtype, Trace


@rule(
    "AMP212",
    Severity.ERROR,
    fix="Cast before the hand-over: `x.float().numpy()` (NumPy has no bfloat16).",
    needs=("failure",),
)
def no_numpy_dtype(trace: Trace) -> Iterator[Evidence]:
    """A bfloat16 tensor was handed to NumPy, which has no such dtype.

    What it does
        Names the tensor, its shape, and the module or line that made it bfloat16.

    Why is this bad?
        Metrics, loggers and matchers that go through NumPy worked in float16 and die in bfloat16.

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
    names = [operand.name for operand in operation.operands if operand.device]
    yield Evidence(
        crash_message(failure, operation, "a bfloat16 tensor was handed to NumPy"),
        module=failure.module,
        sites=sites_of(failure, operation),
        data=data_of(operation),
        fix=f"Cast before the hand-over: `{names[0]}.float().numpy()`." if len(names) == 1 else None,
    )
