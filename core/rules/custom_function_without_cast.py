from collections.abc import Iterator

from ampcheck.rules._operation import crash_message, data_of, function_fix, no_kernel, sites_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import (
    CustomFunction,
    CustomFunctionState,
    DtypeMismatch,
    FailedOperation,
    Failure,
    InPlaceDtype,
    OpNotImplemented,
    Site,
    Trace,
)


@rule(
    "AMP205",
    Severity.WARNING,
    fix="Decorate `forward` with `@torch.amp.custom_fwd(device_type=..., cast_inputs=torch.float32)` and `backward` "
    "with `@torch.amp.custom_bwd(device_type=...)`.",
    needs=("failure",),
)
def custom_function_without_cast(trace: Trace) -> Iterator[Evidence]:
    """A custom `autograd.Function` without `custom_fwd(cast_inputs=...)` failed on its input dtypes.

    What it does
        Finds the `forward` or `backward` of a custom `autograd.Function` in the traceback of a dtype error, and checks
        whether `custom_fwd` decorates it, and with which `cast_inputs`.

    Why is this bad?
        Autocast casts the inputs of the operations it knows. A custom function gets whatever the layers before it
        returned, low precision next to float32, and a kernel written for one dtype fails. `custom_fwd` without
        `cast_inputs` casts nothing; it only records for `custom_bwd` whether autocast was on.

    Example
        ```python
        class Scatter(torch.autograd.Function):
            @staticmethod
            @torch.amp.custom_fwd(device_type="cpu")
            def forward(ctx, values, index):
                ctx.index = index
                return torch.zeros(4, 2).index_add_(0, index, values)

            @staticmethod
            @torch.amp.custom_bwd(device_type="cpu")
            def backward(ctx, gradient):
                return gradient[ctx.index], None
        ```

    Use instead
        ```python
        class Scatter(torch.autograd.Function):
            @staticmethod
            @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
            def forward(ctx, values, index):
                ctx.index = index
                return torch.zeros(4, 2).index_add_(0, index, values)

            @staticmethod
            @torch.amp.custom_bwd(device_type="cpu")
            def backward(ctx, gradient):
                return gradient[ctx.index], None
        ```

    References
        - https://pytorch.org/docs/stable/notes/amp_examples.html#autocast-and-custom-autograd-functions
    """
    failure = trace.failure
    if failure is None:
        return
    facts = failure.facts
    if isinstance(facts, CustomFunctionState):
        yield _evidence(
            trace, failure, FailedOperation(function=facts.function), facts.function, _state(facts.function)
        )
    elif isinstance(facts, (DtypeMismatch, InPlaceDtype, OpNotImplemented)):
        operation, function = facts.operation, facts.operation.function
        if function is not None and function.cast_inputs is None:
            message = f"{crash_message(failure, operation, _what(facts))} {_lacks(function)}"
            yield _evidence(trace, failure, operation, function, message)


def _evidence(
    trace: Trace, failure: Failure, operation: FailedOperation, function: CustomFunction, message: str
) -> Evidence:
    devices = function.device_types or (trace.model.device_type if trace.model else "cuda",)
    return Evidence(
        message,
        module=failure.module,
        sites=sites_of(failure, operation, function.site, _called(trace, failure)),
        data=data_of(operation, "custom-function"),
        severity=Severity.ERROR,
        fix=function_fix(function, devices[0]),
    )


def _called(trace: Trace, failure: Failure) -> Site | None:
    """The line that called the module, of which nothing is on the stack in backward."""
    step = trace.training
    return step.called.get(failure.module) if failure.phase == "backward" and step and failure.module else None


def _state(function: CustomFunction) -> str:
    lacks = "`setup_context`, so `custom_fwd` never sees `ctx`" if function.setup_context else "no `custom_fwd`"
    return f"`{function.name}.backward` is decorated with `custom_bwd`, but its forward has {lacks}."


def _what(facts: DtypeMismatch | InPlaceDtype | OpNotImplemented) -> str:
    if isinstance(facts, OpNotImplemented):
        return no_kernel(facts.operation)
    if isinstance(facts, InPlaceDtype):
        return "the target and the source of a write have different dtypes"
    return "operands had different dtypes"


def _lacks(function: CustomFunction) -> str:
    bare = "has a bare `custom_fwd`, which casts nothing" if function.custom_fwd else "has no `custom_fwd`"
    if function.method == "backward":
        bare = "runs its backward without autocast, but its forward with it"
    return f"The custom function `{function.name}` {bare}."
