"""What the rules about failed operations share: messages, evidence and fixes."""

from collections.abc import Iterable, Sequence
from typing import Any

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._reason import Why, device_type
from ampcheck.rules._words import attribute, cast_of, place, places, sentence
from ampcheck.trace import CustomFunction, FailedOperand, FailedOperation, Failure, Site

_SHORT = 60
# Reasons that leave it to the program which dtype is right.
_BY_DTYPE = ("parameter-not-float32", "autocast-never-entered", "autocast-disabled-here", "float64-operand", "unknown")


def crash_message(failure: Failure, operation: FailedOperation, what: str) -> str:
    """``In conv (Conv2d), <what> in `F.conv2d(...)`: <operands>.``"""
    module, expression = _where(failure), operation.expression or ""
    if len(expression) > _SHORT:
        expression = f"{expression.partition('(')[0]}(...)"
    head = f"In {module}, {what}" if module else sentence(what)
    words = in_words(operation.operands)
    seen = {operand.dtype for operand in operation.operands}
    unseen = set(operation.dtypes) - seen
    if unseen and len(seen) == 1 and seen.issubset(operation.dtypes):
        words += f", another operand is {' or '.join(sorted(unseen))}"
    return f"{head}{f' in `{expression}`' if expression else ''}{f': {words}' if words else ''}."


def _where(failure: Failure) -> str:
    """The module that failed, by name and type."""
    kind = failure.module_type
    if failure.module:
        return f"{failure.module} ({kind})" if kind else failure.module
    return f"the {kind}" if kind else ""


def in_words(operands: Iterable[FailedOperand]) -> str:
    """``x is float16[2, 4] (made by stem), conv.bias is float32[4]``."""
    return ", ".join(_one(operand) for operand in operands)


def _one(operand: FailedOperand) -> str:
    text = f"{operand.name} is {operand.dtype}{list(operand.shape) if operand.shape is not None else ''}"
    made = operand.producer
    if operand.expression is not None:
        text += f" after `{operand.expression}`"
    elif made is not None:
        text += f" (made by {made.module})" if made.module else f" (made by `{made.code}`)"
    return text


def data_of(operation: FailedOperation, reason: str | None = None) -> dict[str, Any]:
    """The evidence as JSON values."""
    function = operation.function
    known = {
        "op": operation.op,
        "expression": operation.expression,
        "autocast_rule": operation.autocast_rule,
        "function": function.name if function is not None else None,
        "reason": reason,
    }
    operands = [_data_of_operand(operand) for operand in operation.operands]
    return {"operands": operands, **{name: value for name, value in known.items() if value is not None}}


def _data_of_operand(operand: FailedOperand) -> dict[str, Any]:
    made = operand.producer
    known = {
        "device": operand.device,
        "role": operand.role,
        "expression": operand.expression,
        "kind": operand.stored,
        "library": operand.library or None,
        "producer": None
        if made is None
        else {"module": made.module, "file": made.site.file, "line": made.site.line, "code": made.code},
    }
    shape = list(operand.shape) if operand.shape is not None else None
    required = {"name": operand.name, "dtype": operand.dtype, "shape": shape}
    return required | {name: value for name, value in known.items() if value is not None}


def told_by(operation: FailedOperation) -> str | None:
    """The rule that reports a crash in a custom function. It knows the function, so the other rules leave the crash to
    it."""
    function = operation.function
    return "AMP205" if function is not None and function.cast_inputs is None else None


def no_kernel(operation: FailedOperation) -> str:
    dtype = next(iter(operation.dtypes), "low precision")
    return f"{operation.op or 'an operation'} has no kernel for {dtype}"


def sites_of(failure: Failure, operation: FailedOperation, *more: Site | None) -> tuple[Site, ...]:
    """The raise line, the lines that made the operands, and ``more``."""
    return places((*failure.sites[:1], *operation.producers, *more))


def cast_fix(operation: FailedOperation, why: Why, throughout: str | None = None) -> str:
    """Up to two fixes for operands with different dtypes, in the names of this crash. ``throughout`` is the dtype of a
    model that is in low precision as a whole: nothing in it is cast to float32."""
    if why.fix:
        return why.fix
    operands, function = operation.operands, operation.function
    low = [operand for operand in operands if operand.dtype in LOW_PRECISION]
    high = [operand for operand in operands if operand.dtype not in LOW_PRECISION]
    device = device_type(operands) or "cuda"
    wide = [operand for operand in high if not operand.stored]
    if throughout is not None and wide and why.reason in _BY_DTYPE:
        casts = ", ".join(dict.fromkeys(cast_of(operand, f".to(torch.{throughout})") for operand in wide))
        return f"The model is {throughout}: cast to it first, {casts}, or make it so: `dtype=torch.{throughout}`."
    if why.reason == "custom-function" and function is not None:
        return function_fix(function, device)
    if why.reason == "parameter-not-float32":
        weight = next(operand for operand in low if operand.stored)
        given = next((operand for operand in high if not operand.stored), None)
        method = f".to(torch.{weight.dtype})"
        casting = cast_of(given, method) if given is not None else f"`{method}`"
        return f"Keep {weight.name} float32 and let autocast cast it, or cast the input: {casting}."
    casting = _cast_call(low, high)
    if why.reason == "autocast-disabled-here" and not why.by_host:
        return f"{casting}, or remove the region{place(why.site)} so that autocast casts."
    double = [operand for operand in operands if operand.dtype == "float64"]
    if double and why.reason in ("float64-operand", "autocast-never-entered"):
        return _from_float64(double)
    if why.reason == "autocast-never-entered":
        entered = next((operand.dtype for operand in low if not operand.stored), "float16")
        casting = casting[:1].lower() + casting[1:]
        return f"Run the call inside `with torch.autocast({device!r}, dtype=torch.{entered}):`, or {casting}."
    if why.reason == "other-thread":
        return f"Enter `with torch.autocast({device!r}, ...):` inside the function that the thread runs."
    return f"{casting}."


def _from_float64(double: Sequence[FailedOperand]) -> str:
    """Autocast never casts float64, on or off."""
    known = [cast_of(operand, ".float()") for operand in double if not operand.library]
    if known:
        return f"Cast to float32 first, or where it is made: {', '.join(known)}."
    return "Cast the float64 input of the module to float32 before the call, or where it is made: `.float()`."


def _cast_call(low: Sequence[FailedOperand], high: Sequence[FailedOperand]) -> str:
    """Cast what is easy to cast: the activations to float32, or the one tensor that the line's casts left out."""
    stored = [operand for operand in high if operand.stored]
    if stored and any(operand.expression is not None for operand in low):
        names = " and ".join(attribute(operand.name) for operand in stored)
        like = next((operand.name for operand in low if operand.expression is None), "x")
        return f"Cast {names} like the others: `.to({like}.dtype)`"
    made = [cast_of(operand, ".float()") for operand in low if not operand.stored and not operand.library]
    if made:
        return f"Cast to float32 first: {', '.join(made)}"
    return "Give all operands one dtype first"


def function_fix(function: CustomFunction, device: str) -> str:
    """The decorators a custom function needs, or the region around its call where it is installed code."""
    if function.library:
        return (
            f"`{function.name}` is installed code: call {function.module or 'it'} inside "
            f"`with torch.autocast({device!r}, enabled=False):`, on `.float()` inputs."
        )
    if function.setup_context:
        return (
            f"Make `{function.name}.forward` take `ctx` (remove `setup_context`) and decorate it with "
            f"`@torch.amp.custom_fwd(device_type={device!r}, cast_inputs=torch.float32)`."
        )
    if function.method == "backward":
        return (
            f"Decorate `{function.name}.forward` with `@torch.amp.custom_fwd(device_type={device!r})` and its "
            f"`backward` with `@torch.amp.custom_bwd(device_type={device!r})`."
        )
    return (
        f"Decorate `{function.name}.forward` with `@torch.amp.custom_fwd(device_type={device!r}, "
        f"cast_inputs=torch.float32)` and its `backward` with `@torch.amp.custom_bwd(device_type={device!r})`."
    )
