from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._operation import data_of, in_words, sites_of, told_by
from ampcheck.rules._words import cast_of
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import DtypeMismatch, OpNotImplemented, Trace


@rule(
    "AMP206",
    Severity.INFO,
    fix="Cast the operands to float32 before the call, `op(x.float())`, or register an autocast rule for the op.",
    needs=("failure",),
)
def op_unknown_to_autocast(trace: Trace) -> Iterator[Evidence]:
    """A custom or extension op without an autocast rule failed on its input dtypes.

    What it does
        Asks PyTorch's dispatcher whether the failed op has an autocast kernel for the device of its operands. A
        function of a compiled extension that is not a dispatcher op cannot have one.

    Why is this bad?
        The op gets whatever the layers before it returned: low precision next to float32. Most extension kernels
        support one dtype, and many only float32.

    Example
        ```python
        with torch.autocast("cuda"):
            y = torch.ops.mylib.pool(self.conv(x), rois)
        ```

    Use instead
        ```python
        with torch.autocast("cuda"):
            y = torch.ops.mylib.pool(self.conv(x).float(), rois)
        ```

    References
        - https://pytorch.org/tutorials/advanced/dispatcher.html#autocast
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, (DtypeMismatch, OpNotImplemented)):
        return
    operation = failure.facts.operation
    if not operation.custom or operation.autocast_rule is not False:
        return
    low = [operand for operand in operation.operands if not operand.library and operand.dtype in LOW_PRECISION]
    casts = ", ".join(cast_of(operand, ".float()") for operand in low)
    yield Evidence(
        f"`{operation.op}` has no autocast rule, so nothing cast its operands: {in_words(operation.operands)}.",
        module=failure.module,
        sites=sites_of(failure, operation),
        data=data_of(operation, "op-unknown-to-autocast"),
        severity=Severity.ERROR,
        fix=f"Cast before the call: {casts}." if casts else None,
        told_by=told_by(operation) or ("AMP207" if isinstance(failure.facts, OpNotImplemented) else None),
    )
