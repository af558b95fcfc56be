from collections.abc import Iterator
from typing import Any

from ampcheck.rules._edits import replacing
from ampcheck.rules._words import places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastCall, Trace


@rule(
    "AMP102",
    Severity.ERROR,
    fix="Write `torch.autocast(x.device.type, dtype=...)`: the device type must be a string.",
    needs=("failure",),
)
def autocast_bad_argument(trace: Trace) -> Iterator[Evidence]:
    """`autocast()` got an argument it does not take, or no device type.

    What it does
        Reads the call that raised and names the mistake: `device=` instead of `device_type=`, `device_type=` passed
        to `torch.cuda.amp.autocast` (which is for CUDA anyway), a `torch.device` instead of a string, a device that
        torch does not know, or no device type at all. If the argument comes from a dictionary or a
        `functools.partial`, names that and the line that defines it.

    Why is this bad?
        The call raises before any operation runs. PyTorch's message names neither the dictionary that holds the
        argument nor the correct spelling.

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
        edit=replacing(places([call.site]), call.call, call.corrected) if call.replaces == "call" else None,
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
    origin = f", which comes from `{made.kwargs_variable}`" if made.kwargs_variable is not None else ""
    if made.reason == "device-keyword":
        return f"{call} passes `device`{value}{origin}; `{name}` calls it `device_type`."
    if made.reason == "device-type-keyword":
        return f"{call} passes `device_type`{value}{origin}; `{name}` does not take it."
    if made.reason == "unexpected-keyword":
        allowed = ", ".join(f"`{one}`" for one in made.allowed or ())
        return f"{call} passes `{made.argument}`{value}{origin}, which `{name}` does not take; it takes {allowed}."
    if made.reason == "no-device-type":
        origin = f" (`{made.kwargs_variable}` does not contain it)" if made.kwargs_variable is not None else ""
        return f"{call} passes no `device_type`{origin}, and `{name}` has no default for it."
    if made.reason == "device-not-a-string":
        return f"{call} passes a `{made.type}` as `device_type`{value}{origin}; it must be a string."
    if made.reason == "dtype-not-a-dtype":
        return f"{call} passes a `{made.type}` as `dtype`{value}{origin}; it must be a `torch.dtype`."
    if made.reason == "unknown-device":
        given = f"`{made.device}`" if made.device is not None else made.value or "a device"
        return f"{call} asks for {given}{origin}; autocast does not know this device type."
    return f"{call} passes arguments that `{name}` does not take."


def _fix(call: AutocastCall) -> str:
    corrected = f"`{call.corrected}`"
    if call.replaces == "kwargs":
        where = f" in `{call.kwargs_variable}`" if call.corrected.startswith("return ") else ""
        return f"Write {corrected}{where}."
    return f"Write {corrected}."
