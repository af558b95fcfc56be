from collections.abc import Iterator

from ampcheck.rules._numbers import (
    acquitted,
    compared,
    data_of,
    in_float32,
    op_of,
    overflowed,
    reached,
    sites_of,
    told_as,
    where,
)
from ampcheck.rules._words import count, place, sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import NonFinite, Origin, Trace

# By op: how to keep its operand away from the point where it is singular.
_FIXES = {
    ("cdist", "norm", "linalg_vector_norm", "dist", "hypot"): "Add a small number under its root: "
    "`(x.square().sum(-1) + 1e-12).sqrt()`.",
    ("rsqrt", "sqrt", "pow"): "Keep its operand above 0: `x.clamp(min=1e-12)` before the op.",
    ("log", "log2", "log10", "xlogy"): "Keep its operand above 0: `x.clamp(min=1e-12)` before the op.",
    ("log1p",): "Keep its operand above -1: `x.clamp(min=-1 + 1e-6)` before the op.",
    ("logit",): "Keep its operand inside (0, 1): `x.clamp(1e-6, 1 - 1e-6)` before the op.",
    ("exp", "exp2", "expm1", "sinh", "cosh"): "Bound its operand: `x.clamp(max=...)` before the op; a mask after it is "
    "too late.",
    ("acos", "asin", "atanh"): "Keep its operand inside (-1, 1): `x.clamp(-1 + 1e-6, 1 - 1e-6)` before the op.",
    ("div", "reciprocal"): "Keep its divisor away from 0: `.clamp(min=...)`, or `torch.where` on the divisor.",
    ("var", "std", "var_mean", "std_mean"): "Give it more than one element, and keep the variance above 0 before a "
    "root.",
    ("_ctc_loss", "ctc_loss"): "Give targets that are no longer than the inputs, or `zero_infinity=True`.",
}
_MASKED = "Keep infinities out of it: multiply by 0 or subtract only what is finite, or use `torch.where` on a mask."


@rule(
    "AMP504",
    Severity.ERROR,
    fix="Keep the operand away from the point where the op is singular, before the op: a mask after it leaves NaN in "
    "the gradient.",
    needs=("numbers",),
)
def singular_operation(trace: Trace) -> Iterator[Evidence]:
    """An op is not finite for these operands whatever the precision, and the loss or a gradient is not.

    What it does
        Computes the op alone again in float64, from the same operands. It is not finite there either (0 / 0, the
        logarithm or the root's gradient at 0, an infinity times 0), or an exponential or a power that float32 cannot
        hold.

    Why is this bad?
        It is a fault of the formula, or of the data, at a point that one batch reaches. `torch.where` after the op does
        not help: the gradient of the branch that is not taken is 0 times infinity.

    Example
        ```python
        distance = (a - b).square().sum(-1).sqrt()
        ```

    Use instead
        ```python
        distance = ((a - b).square().sum(-1) + 1e-12).sqrt()
        ```

    References
        - https://pytorch.org/docs/stable/notes/autograd.html#gradients-for-non-differentiable-functions
        - https://github.com/pytorch/pytorch/issues/108618
    """
    for found, origin in told_as(trace, "AMP504"):
        yield Evidence(
            f"{acquitted(found)}{_what(origin)}{where(found)}; {reached(found)}.{compared(found)}",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
            fix=_fix(trace, found, origin),
        )


def _what(origin: Origin) -> str:
    name = sentence(op_of(origin))
    if origin.kind == "overflow":
        return f"{name} overflowed {origin.dtype}{overflowed(origin)}"
    if origin.kind == "masked" and not origin.nan:
        return f"An infinity that the code wrote{place(origin.site)} reached the loss"
    if origin.kind == "masked":
        return f"{name} turned infinities that the code wrote{place(origin.fill)} into NaN"
    zeros = [one.zeros for one in origin.operands if one.zeros]
    held = f" ({count(zeros[-1], 'element')} of an operand {'is' if zeros[-1] == 1 else 'are'} 0)" if zeros else ""
    return f"{name} is not finite for its operands, in float64 neither{held}"


def _fix(trace: Trace, found: NonFinite, origin: Origin) -> str | None:
    float32 = found.outcomes.get("float32")
    if float32 is not None and float32.finite:
        # The operand itself is 0 only because of the dtype.
        return in_float32(trace, found, origin)
    if origin.kind == "masked":
        return _MASKED
    name = origin.op.removeprefix("aten::").rstrip("_")
    return next((fix for ops, fix in _FIXES.items() if name in ops), None)
