from collections.abc import Iterator
from typing import Any

from ampcheck.rules._words import places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastCall, Trace


@rule(
    "AMP102",
    Severity.ERROR,
    fix="Call `torch.autocast(device_type, dtype=...)` with the device type as a string, such as `x.device.type`.",
    needs=("failure",),
)
def autocast_bad_argument(trace: Trace) -> Iterator[Evidence]:
    """`autocast()` got an argument it does not take, or none that says which device it is for.

    What it does
        Reads the call that raised: `device=` for `device_type=`, `device_type=` given to `torch.cuda.amp.autocast`
        (whose name says the device already), a `torch.device` for a string, a device torch does not know, no device
        type at all. Where the argument came out of a dictionary or a `functools.partial`, names it and the line
        where it was written.

    Why is this bad?
        The call raises before a single operation has run. The message names neither the dictionary that held the
        argument nor the spelling that is right.

    Example
        ```python
        amp = dict(device="cpu", dtype=torch.bfloat16)
        with torch.autocast(**amp):
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        amp = dict(device_type="cpu", dtype=torch.bfloat16)
        with torch.autocast(**amp):
            loss = criterion(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.autocast
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, AutocastCall):
        return
    call = failure.facts
    yield Evidence(
        _message(call),
        module=failure.module,
        sites=places((call.site, call.kwargs_site)) or failure.sites[:1],
        data=_data(call),
        fix=_fix(call),
    )


def _data(call: AutocastCall) -> dict[str, Any]:
    known = {
        "reason": call.reason,
        "argument": call.argument,
        "allowed": list(call.allowed) if call.allowed is not None else None,
        "type": call.type,
        "device": call.device,
        "call": call.call,
        "deprecated": call.deprecated,
        "kwargs_variable": call.kwargs_variable,
        "value": call.value,
        "replaces": call.replaces,
        "corrected": call.corrected,
    }
    return {name: value for name, value in known.items() if value is not None}


def _message(made: AutocastCall) -> str:
    call = f"`{made.call}`" if made.call is not None else "A call of `autocast`"
    name = made.deprecated or "autocast"
    value = f" ({made.value})" if made.value is not None else ""
    origin = f", which came out of `{made.kwargs_variable}`" if made.kwargs_variable is not None else ""
    if made.reason == "device-keyword":
        return f"{call} passes `device`{value}{origin}; the argument of `{name}` is called `device_type`."
    if made.reason == "device-type-keyword":
        return f"{call} passes `device_type`{value}{origin}; `{name}` does not take it."
    if made.reason == "unexpected-keyword":
        allowed = ", ".join(f"`{one}`" for one in made.allowed or ())
        return f"{call} passes `{made.argument}`{value}{origin}, which `{name}` does not take; it takes {allowed}."
    if made.reason == "no-device-type":
        origin = f": `{made.kwargs_variable}` holds none" if made.kwargs_variable is not None else ""
        return f"{call} passes no `device_type`{origin}, and `{name}` has no default for it."
    if made.reason == "device-not-a-string":
        return f"{call} passes a `{made.type}` as `device_type`{value}{origin}, which must be a string."
    if made.reason == "dtype-not-a-dtype":
        return f"{call} passes a `{made.type}` as `dtype`{value}{origin}, which must be a `torch.dtype`."
    if made.reason == "unknown-device":
        given = f"`{made.device}`" if made.device is not None else made.value or "what it was given"
        return f"{call} asks for the device type {given}{origin}, which autocast does not know."
    return f"{call} passes arguments that `{name}` does not take."


def _fix(call: AutocastCall) -> str:
    corrected = f"`{call.corrected}`"
    if call.replaces == "kwargs":
        where = f" in `{call.kwargs_variable}`" if call.corrected.startswith("return ") else ""
        return f"Write {corrected}{where}."
    return f"Write {corrected}."
