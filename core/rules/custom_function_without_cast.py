from collections.abc import Iterator

from ampcheck.rules._crash import crash_message, data_of, function_fix, sites_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace

_CRASHES = {
    "dtype-mismatch": "operands of different dtypes met",
    "in-place-dtype": "the target and the source of a write differ in dtype",
    "op-not-implemented": "{op} has no kernel for {dtype}",
}


@rule(
    "AMP205",
    Severity.WARNING,
    fix="Decorate `forward` with `@torch.amp.custom_fwd(device_type=..., cast_inputs=torch.float32)` and `backward` "
    "with `@torch.amp.custom_bwd(device_type=...)`.",
    needs=("failure",),
)
def custom_function_without_cast(trace: Trace) -> Iterator[Evidence]:
    """A custom `autograd.Function` without `custom_fwd(cast_inputs=...)` died of the dtypes it got.

    What it does
        Finds the `forward` or `backward` of a custom `autograd.Function` in the traceback of a dtype crash, and reads
        whether `custom_fwd` decorates it and with which `cast_inputs`.

    Why is this bad?
        Autocast casts the inputs of operations it knows. A custom function gets what the layers before it returned,
        low precision beside float32, and kernels written for one dtype die of that. `custom_fwd` without
        `cast_inputs` casts nothing; it records whether autocast was on, for `custom_bwd`.

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
    function = failure.fields.get("function") if failure is not None else None
    if failure is None or function is None:
        return
    devices = function.get("device_types") or [trace.model.device_type if trace.model else "cuda"]
    if failure.kind == "custom-function-state":
        lacks = "no `custom_fwd`"
        if function.get("setup_context"):
            lacks = "`setup_context`, whose `ctx` `custom_fwd` never sees"
        message = f"`{function['name']}.backward` is decorated with `custom_bwd`, but its forward has {lacks}."
    elif failure.kind in _CRASHES and function["cast_inputs"] is None:
        bare = "has a bare `custom_fwd`, which casts nothing" if function["custom_fwd"] else "has no `custom_fwd`"
        if function["method"] == "backward":
            bare = "leaves autocast off in its backward, where it was on in its forward"
        dtype = next(iter(failure.fields.get("dtypes", ())), "low precision")
        what = _CRASHES[failure.kind].format(op=failure.fields.get("op", "an operation"), dtype=dtype)
        message = f"{crash_message(failure, what)} The custom function `{function['name']}` {bare}."
    else:
        return
    yield Evidence(
        message,
        module=failure.module,
        sites=sites_of(failure, function.get("site")),
        data={**data_of(failure), "function": function["name"], "reason": "custom-function"},
        severity=Severity.ERROR,
        fix=function_fix(function, devices[0]),
    )
