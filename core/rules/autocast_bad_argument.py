from collections.abc import Iterator, Mapping
from typing import Any

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


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
    if failure is None or failure.kind != "autocast-bad-argument":
        return
    facts = failure.fields
    sites = tuple(facts[role] for role in ("site", "kwargs_site") if role in facts) or failure.sites[:1]
    data = {name: value for name, value in facts.items() if name not in ("site", "kwargs_site", "module_type")}
    yield Evidence(_message(facts), module=failure.module, sites=sites, data=data, fix=_fix(facts))


def _message(facts: Mapping[str, Any]) -> str:
    call = f"`{facts['call']}`" if "call" in facts else "A call of `autocast`"
    name = facts.get("deprecated", "autocast")
    value = f" ({facts['value']})" if "value" in facts else ""
    origin = f", which came out of `{facts['kwargs_variable']}`" if "kwargs_variable" in facts else ""
    reason = facts["reason"]
    if reason == "device-keyword":
        return f"{call} passes `device`{value}{origin}; the argument of `{name}` is called `device_type`."
    if reason == "device-type-keyword":
        return f"{call} passes `device_type`{value}{origin}; `{name}` does not take it."
    if reason == "unexpected-keyword":
        allowed = ", ".join(f"`{one}`" for one in facts["allowed"])
        return f"{call} passes `{facts['argument']}`{value}{origin}, which `{name}` does not take; it takes {allowed}."
    if reason == "no-device-type":
        origin = f": `{facts['kwargs_variable']}` holds none" if "kwargs_variable" in facts else ""
        return f"{call} passes no `device_type`{origin}, and `{name}` has no default for it."
    if reason == "device-not-a-string":
        return f"{call} passes a `{facts['type']}` as `device_type`{value}{origin}, which must be a string."
    if reason == "dtype-not-a-dtype":
        return f"{call} passes a `{facts['type']}` as `dtype`{value}{origin}, which must be a `torch.dtype`."
    if reason == "unknown-device":
        given = f"`{facts['device']}`" if "device" in facts else facts.get("value", "what it was given")
        return f"{call} asks for the device type {given}{origin}, which autocast does not know."
    return f"{call} passes arguments that `{name}` does not take."


def _fix(facts: Mapping[str, Any]) -> str:
    corrected = f"`{facts['corrected']}`"
    if facts["replaces"] == "kwargs":
        where = f" in `{facts['kwargs_variable']}`" if facts["corrected"].startswith("return ") else ""
        return f"Write {corrected}{where}."
    return f"Write {corrected}."
