import math
from collections.abc import Iterator

from ampcheck.rules._words import be, count, place, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Cause, Comparison, Trace

_BRANCH_FIX = (
    "Replace the branch with `torch.where(...)`, or export with `torch.jit.script` or `torch.cond`, which keep both "
    "branches."
)
_FIXES = {
    "data-dependent": _BRANCH_FIX,
    "frozen-shape": "Read sizes from `x.shape` without `int()`, `len()` or NumPy, and declare the sizes that may "
    "change (`dynamic_shapes=`, `dynamic_axes=`).",
    "training-mode": "Call `model.eval()` before the export, and export again.",
    "buffer-update": "Call `model.eval()` before the export; if `forward` must change a buffer, pass it in as an input "
    "and return it.",
    "state-differs": "Export again, from the weights that the eager model has.",
    "left-dispatcher": "Compute it with tensor operations while exporting, or register the function with "
    "`torch.library.custom_op`.",
    "unsettled": "Compare on your own inputs (`fresh_inputs=`) and with trained weights, where values that the model "
    "sorts or cuts off lie further apart.",
    "raises": "Export on inputs of the same device, dtype and sizes, and create tensors with `device=x.device`.",
}

_ROUNDED = 0.1


@rule(
    "AMP601",
    Severity.ERROR,
    fix="Check the code of the named module, outside its submodules, and compare again after each change.",
    needs=("comparison",),
)
def export_differs(trace: Trace) -> Iterator[Evidence]:
    """The exported model disagrees with the eager one on fresh inputs.

    What it does
        Runs the exported and the eager model on the example and on fresh inputs, compares the outputs within the
        tolerance of their dtype, and names the first module whose output differs. Gives the reason if it can be shown:
        a value read from a tensor that decides a branch, a size frozen by the trace, dropout or batch norm left in
        training mode, buffers that the model writes, or different weights.

    Why is this bad?
        A trace records what happened on one example. It is exact there, and `check_trace` compares on that same
        example.

    Example
        ```python
        class Gate(nn.Module):
            def forward(self, x):
                return x if x.mean() > 0 else -x


        exported = torch.jit.trace(Gate(), example)
        ```

    Use instead
        ```python
        class Gate(nn.Module):
            def forward(self, x):
                return torch.where(x.mean() > 0, x, -x)


        exported = torch.jit.trace(Gate(), example)
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.jit.trace.html
        - https://pytorch.org/docs/stable/export.html
    """
    comparison = trace.comparison
    assert comparison is not None
    if not comparison.export:
        return
    told = [cause for cause in comparison.causes if not (cause.reason == "raises" and len(comparison.causes) > 1)]
    explained = False
    for cause in told:
        explains = not comparison.equal and cause.certain
        verdict = "" if explained or not explains else f" {_verdict(comparison)}"
        explained = explained or explains
        yield Evidence(
            f"{_said(cause, comparison)}{verdict}",
            module=cause.module if cause.module is not None else comparison.culprit,
            sites=cause.sites,
            data={"reason": cause.reason, "detail": cause.detail, **_numbers(comparison)},
            severity=Severity.ERROR if cause.certain else Severity.WARNING,
            fix=_FIXES[cause.reason],
        )
    if not comparison.equal and not explained and comparison.rounding is None:
        rounds = max((output.relative for output in comparison.outputs if not output.equal), default=math.inf)
        yield Evidence(
            _verdict(comparison),
            # What low precision rounds away over a deep model.
            told_by="AMP604" if comparison.casts and rounds < _ROUNDED else None,
            module=_baked(comparison) or comparison.culprit,
            data={"reason": "baked-constant" if comparison.constants else "unknown", **_numbers(comparison)},
            fix="Compute inside the graph what was frozen in it, and compare again." if comparison.constants else None,
        )


def _said(cause: Cause, comparison: Comparison) -> str:
    second, where = comparison.second, cause.module or "the model"
    at = place(cause.sites[0]) if cause.sites else ""
    if cause.reason == "data-dependent":
        held = f"a Python value is read from a tensor{at}, in {where}"
        return f"{held[0].upper()}{held[1:]}: it {cause.detail}. The {second} always uses one of its values."
    if cause.reason == "frozen-shape":
        return f"The {second} is fixed to the sizes of its example: {cause.detail}."
    if cause.reason == "training-mode":
        op, _, others = cause.detail.partition(": ")
        what = "Dropout" if op == "dropout" else "Batch norm"
        does = "drops at random" if what == "Dropout" else "normalizes by the statistics of each batch"
        more = f", and in {some(others.split(', '))}" if others else ""
        return f"{what} was left in training mode: in {where} the {second} {does}{at}{more}."
    if cause.reason == "buffer-update":
        who, _, names = cause.detail.partition(": ")
        buffers = some(names.split(", "))
        if who == "exported":
            return (
                f"Every call of the {second} updates {buffers}, and so did every call during the export: it starts "
                "from the values that the export left."
            )
        return f"Every call of the eager model updates {buffers}, but the {second} keeps the values of the export."
    if cause.reason == "state-differs":
        names_ = cause.detail.split(", ")
        return f"{some(names_)} {be(len(names_))} not the same in the {second} as in the eager model."
    if cause.reason == "left-dispatcher":
        return f"In {where}, code outside the dispatcher computes an activation ({cause.detail}){at}."
    if cause.reason == "unsettled":
        return (
            f"Rounding decides what the model returns, so some outputs cannot be compared: those of the {second} "
            f"differ (relative error {cause.detail}), and those of the eager model change by as much when its modules "
            "round differently."
        )
    return f"The {second} raises where the eager model does not: {cause.detail}."


def _verdict(comparison: Comparison) -> str:
    """What differs, by how much, and where it begins."""
    worst = [output for output in comparison.outputs if not output.equal]
    if not worst:
        return f"The {comparison.second} does not run on the inputs that the eager model runs on."
    output = max(worst, key=lambda o: o.relative)
    size = f"largest absolute error {output.absolute:.3g}, relative {output.relative:.3g}, on {output.inputs}"
    several = f"{count(len(worst), 'output')} of the {comparison.second} differ{'s' if len(worst) == 1 else ''}"
    text = f"{several} from the eager model's ({size})."
    first, culprit, baked = comparison.first_module, comparison.culprit, _baked(comparison)
    if first is None:
        return text + (f" The module is not known: {comparison.unseen}." if comparison.unseen else "")
    text += f" The first module whose output differs is {first.module or 'the model itself'}."
    if baked and baked != first.module:
        text += f" Before it runs {baked}, whose result is a constant."
    elif first.inputs_equal is False:
        text += f" Its inputs differ already, so the cause is in the code of {culprit or 'the model'} itself."
    return text


def _baked(comparison: Comparison) -> str | None:
    """The module whose result is a constant of the graph, if the first module that differs may come after it."""
    first = comparison.first_module
    after = first is None or first.inputs_equal is not True
    return comparison.constants[0].module if comparison.constants and after else None


def _numbers(comparison: Comparison) -> dict[str, object]:
    first = comparison.first_module
    return {
        "format": comparison.second,
        "first_module": first.module if first else None,
        "outputs": {
            o.output: {"absolute": _json(o.absolute), "relative": _json(o.relative)} for o in comparison.outputs
        },
    }


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None
