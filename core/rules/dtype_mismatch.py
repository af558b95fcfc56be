from collections.abc import Iterator

from ampcheck.rules._facts import low_throughout
from ampcheck.rules._operation import cast_fix, crash_message, data_of, sites_of, told_by
from ampcheck.rules._reason import Why, why_autocast_did_not_act
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import DtypeMismatch, Failure, Trace


@rule(
    "AMP203",
    Severity.ERROR,
    fix="Give the operands one dtype: cast the low-precision one with `.float()`, or let autocast cast them.",
    needs=("failure",),
)
def dtype_mismatch(trace: Trace) -> Iterator[Evidence]:
    """An operation got tensors of different dtypes, and autocast did not cast them.

    What it does
        Names the module, the operation, each operand with its dtype, its shape and the line or module that made it,
        and the reason why autocast did not cast: it was off here, was never entered, or was entered for another device;
        a parameter is not float32; an operand is float64, which autocast never casts; autocast had cached a cast to
        another region's dtype; the policy of a sharded model casts one operand and not the other; the code is in a
        custom `autograd.Function`; or the operation writes in place, ran in another thread, or has no autocast rule.
        If none of these can be shown, the reason is unknown.

    Why is this bad?
        The step fails. PyTorch's message names two dtypes, but no module, no tensor and no reason. Casting the wrong
        operand (the input, say) hides the bug or moves it to the next layer.

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
    throughout = low_throughout(trace)
    what = "autocast refused to promote operands" if failure.facts.promotes else "operands had different dtypes"
    message = crash_message(failure, operation, what)
    yield Evidence(
        f"{message[:-1]}. Autocast did not cast them: {why.words}.",
        module=failure.module,
        sites=sites_of(failure, operation, why.site),
        data=data_of(operation, why.reason),
        fix=cast_fix(operation, why, throughout),
        told_by=told_by(operation) or ("AMP206" if operation.custom and operation.autocast_rule is False else None),
        situation=_situation(failure, why, throughout),
    )


def _situation(failure: Failure, why: Why, throughout: str | None) -> str | None:
    if throughout is not None:
        return "low-precision-model"
    evaluating = failure.phase.startswith(("eval", "val", "test", "predict", "sanity"))
    if evaluating and (why.by_host or why.reason == "autocast-never-entered"):
        return "evaluation"
    return "low-precision-parameter" if why.reason == "parameter-not-float32" else None
