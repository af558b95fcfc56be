"""How the rules on numbers tell what failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._words import place
from ampcheck.trace import NonFinite, Origin, Site, Trace

_PRECISIONS = ("float32", "bfloat16", "scale_1")
_ATTENTION = ("softmax", "attention")
# They leave float32's range for operands of ordinary size.
_GROWING = ("exp", "pow", "sinh", "cosh", "prod", "cumprod")
Told = tuple[NonFinite, Origin]


def code_of(found: NonFinite) -> str:
    """The code of the rule that tells what failed; AMP501 where nothing more is known."""
    origin = found.origin
    if origin is None:
        return "AMP501"
    if origin.kind == "overflow":
        if origin.dtype in LOW_PRECISION:
            return "AMP502"
        return "AMP504" if origin.op.removeprefix("aten::").startswith(_GROWING) else "AMP501"
    if origin.kind == "given" and origin.given is not None:
        return "AMP510" if origin.given.what == "input" else "AMP511"
    if origin.kind == "masked":
        return "AMP505" if any(part in origin.op for part in _ATTENTION) else "AMP504"
    return {"constant-lost": "AMP503", "singular": "AMP504"}.get(origin.kind, "AMP501")


def told_as(trace: Trace, code: str) -> Iterator[Told]:
    """The steps of the trace that a rule tells, with their origins."""
    for found in trace.numbers or ():
        if found.origin is not None and code_of(found) == code:
            yield found, found.origin


def acquitted(found: NonFinite) -> str:
    """The first sentence where the batch fails in float32 too."""
    outcome = found.outcomes.get("float32")
    if outcome is None or outcome.finite is not False:
        return ""
    return "Precision is not to blame: in float32 this batch is not finite either. "


def where(found: NonFinite) -> str:
    return f" in step {found.step}" if found.step is not None else ""


def reached(found: NonFinite) -> str:
    """What became of it: the loss, or which gradients."""
    if found.root == "loss":
        return "the loss is not finite"
    if found.root == "gradient":
        names = f" ({found.parameters[0]} first)" if found.parameters else ""
        return f"the loss is finite, and its gradients are not{names}"
    return "a value is not finite"


def compared(found: NonFinite) -> str:
    """What the same batch gave in other precisions, if it is finite in one of them."""
    finite = {name: one for name, one in found.outcomes.items() if name != found.precision and one.finite}
    said = [name + (f" (loss {finite[name].loss:.6g})" if finite[name].loss is not None else "")
            for name in ("float32", "bfloat16") if name in finite]  # fmt: skip
    text = f" In {' and in '.join(said)} this batch is finite." if said else ""
    bfloat16 = found.outcomes.get("bfloat16")
    if "float32" in finite and bfloat16 is not None and bfloat16.finite is False and found.precision != "bfloat16":
        text += " In bfloat16 it is not."
    return text + (f" Approximate: {found.approximate}." if found.approximate else "")


def sites_of(origin: Origin) -> tuple[Site, ...]:
    constant = origin.constant.site if origin.constant is not None else None
    found = [one for one in (origin.fill, constant, origin.site) if one is not None]
    lines: dict[tuple[str, int], Site] = {}
    for site in found:
        lines[site.file, site.line] = site
    return tuple(lines.values())


def op_of(origin: Origin) -> str:
    """```bmm``` or ``the gradient of `bmm```."""
    name = f"`{origin.op.partition('::')[2] or origin.op}`"
    return f"the gradient of {name}" if origin.phase == "backward" else name


def overflowed(origin: Origin) -> str:
    """What the result truly is, beside the end of its dtype."""
    if origin.true_value is None or origin.limit is None:
        return ""
    if abs(origin.true_value) <= origin.limit:
        return f" on the way: the result itself is {number(origin.true_value)}"
    return f": its true value is {number(origin.true_value)}, and {origin.dtype} ends at {number(origin.limit)}"


def number(value: float) -> str:
    return f"{value:.4g}"


def data_of(found: NonFinite, origin: Origin | None) -> dict[str, Any]:
    outcomes = {name: found.outcomes[name].finite if name in found.outcomes else None for name in _PRECISIONS}
    losses = {name: outcome.loss for name, outcome in found.outcomes.items() if outcome.loss is not None}
    data: dict[str, Any] = {"root": found.root, "step": found.step, "finite_in": outcomes}
    if origin is not None:
        data |= {
            "op": origin.op,
            "kind": origin.kind,
            "phase": origin.phase,
            "dtype": origin.dtype,
            "samples": list(origin.samples),
            "not_finite": origin.count,
            "elements": origin.size,
            "operands": [
                {"dtype": one.dtype, "shape": list(one.shape), "largest": one.largest, "zeros": one.zeros}
                for one in origin.operands
            ],
            "path": [
                {"op": one.op, "dtype": one.dtype, "phase": one.phase, **({"line": one.site.line} if one.site else {})}
                for one in found.path
            ],
        }
        if origin.true_value is not None:
            data |= {"true_value": origin.true_value, "limit": origin.limit}
        if origin.given is not None:
            data["given"] = {"what": origin.given.what, "name": origin.given.name}
        if origin.constant is not None:
            data["constant"] = {"value": origin.constant.value, "becomes": origin.constant.becomes}
    if losses:
        data["losses"] = {name: loss for name, loss in losses.items() if loss == loss and abs(loss) != float("inf")}
    if found.parameters:
        data["parameters"] = list(found.parameters)
    if found.said:
        data["replay"] = found.said
    return data


def finite_elsewhere(found: NonFinite) -> str | None:
    """The precision to train in instead: of those in which the batch is finite, the cheaper."""
    return next((name for name in ("bfloat16", "float32") if (one := found.outcomes.get(name)) and one.finite), None)


def in_float32(trace: Trace, found: NonFinite, origin: Origin) -> str:
    """The fix for what only low precision does."""
    device = trace.model.device_type if trace.model is not None else "cuda"
    bfloat16 = found.outcomes.get("bfloat16")
    other = ", or train in bfloat16, in which this batch is finite" if bfloat16 and bfloat16.finite else ""
    return (
        f"Compute it in float32: put the code{place(origin.site)} inside "
        f"`with torch.autocast({device!r}, enabled=False):` and call `.float()` on its operands{other}."
    )


GROWN = (
    "Lower the learning rate, warm it up, or clip the gradients: the values had grown too large for float32 as well."
)
