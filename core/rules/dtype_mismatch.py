from collections.abc import Iterator

from ampcheck.rules._operation import cast_fix, crash_message, data_of, sites_of, told_by
from ampcheck.rules._reason import why_autocast_did_not_act
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import DtypeMismatch, Trace


@rule(
    "AMP203",
    Severity.ERROR,
    fix="Give the operands one dtype: cast the low-precision one with `.float()`, or let autocast cast them.",
    needs=("failure",),
)
def dtype_mismatch(trace: Trace) -> Iterator[Evidence]:
    """An operation got tensors of different dtypes, and autocast did not cast them.

    What it does
        Takes the crash apart: the module, the operation, each operand with dtype, shape and the line or module that
        made it, and the reason why autocast did not act: it was off here, was never entered (or for another device),
        a parameter is not float32, an operand is float64 (which autocast never casts), a cast of another region's dtype
        was in autocast's cache, the policy of a sharded model casts one and not the other, the code is in a custom
        `autograd.Function`, the operation writes in place, ran in another thread, or is one autocast has no rule for.
        A reason that cannot be established is called unknown.

    Why is this bad?
        The step dies. PyTorch's message names two dtypes, but no module, no tensor and no reason; casting the wrong
        one (the input, say) hides the fault or moves it to the next layer.

    Example
        ```python
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.stem(x)
            with torch.autocast("cpu", enabled=False):
                return self.head(y)  # y is bfloat16, the weights are float32
        ```

    Use instead
        ```python
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.stem(x)
            with torch.autocast("cpu", enabled=False):
                return self.head(y.float())
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocast-op-reference
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, DtypeMismatch):
        return
    operation = failure.facts.operation
    why = why_autocast_did_not_act(trace, failure, failure.facts)
    what = "autocast met its other low precision" if failure.facts.promotes else "operands of different dtypes met"
    message = crash_message(failure, operation, what)
    yield Evidence(
        f"{message[:-1]}. Autocast did not unify them: {why.words}.",
        module=failure.module,
        sites=sites_of(failure, operation, why.site),
        data=data_of(operation, why.reason),
        fix=cast_fix(operation, why),
        told_by=told_by(operation),
    )
