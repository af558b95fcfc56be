"""What the rules about crashes have in common: operands in words, and why autocast did not act."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._facts import casts_by_policy
from ampcheck.rules._words import be, place
from ampcheck.trace import Failure, ModuleCall, Site, StepTrace, Trace

Operand = Mapping[str, Any]
_SHORT = 60


class Why(NamedTuple):
    """Why autocast did not act: one of the reasons of the report's format, in words, the line behind it, and the way
    out where it is this reason's own."""

    reason: str
    words: str
    site: Site | None = None
    fix: str = ""


def where(failure: Failure) -> str:
    """The module that failed, by name and type."""
    kind = failure.fields.get("module_type")
    if failure.module:
        return f"{failure.module} ({kind})" if kind else failure.module
    return f"the {kind}" if kind else ""


def crash_message(failure: Failure, what: str) -> str:
    """``conv (Conv2d): <what> in `F.conv2d(...)`, on <operands>.``"""
    module, expression = where(failure), failure.fields.get("expression", "")
    if len(expression) > _SHORT:
        expression = f"{expression.partition('(')[0]}(...)"
    head = f"In {module}, {what}" if module else what[:1].upper() + what[1:]
    words = in_words(failure.fields.get("operands", ()))
    return f"{head}{f' in `{expression}`' if expression else ''}{f': {words}' if words else ''}."


def in_words(operands: Iterable[Operand]) -> str:
    """``x is float16[2, 4] (made by stem), conv.bias is float32[4]``."""
    return ", ".join(_one(operand) for operand in operands)


def _one(operand: Operand) -> str:
    shape = operand.get("shape")
    text = f"{operand['name']} is {operand['dtype']}{shape if shape is not None else ''}"
    producer = operand.get("producer")
    if "expression" in operand:
        text += f" after `{operand['expression']}`"
    elif producer is not None:
        text += f" (made by {producer['module']})" if producer["module"] else f" (made by `{producer['code']}`)"
    return text


def data_of(failure: Failure, why: Why | None = None) -> dict[str, Any]:
    """The evidence as JSON values."""
    fields = failure.fields
    data: dict[str, Any] = {"operands": list(fields.get("operands", ()))}
    for name in ("op", "expression", "autocast_rule"):
        if fields.get(name) is not None:
            data[name] = fields[name]
    if "function" in fields:
        data["function"] = fields["function"]["name"]
    if why is not None:
        data["reason"] = why.reason
    return data


def told_by(failure: Failure) -> dict[str, str]:
    """Which rule tells of the crash, where it is in a custom function: the reader is told once, by the rule that knows
    of the function."""
    function = failure.fields.get("function")
    return {"told_by": "AMP205"} if function is not None and function["cast_inputs"] is None else {}


def sites_of(failure: Failure, *more: Site | None) -> tuple[Site, ...]:
    """The raise line, the lines that made the operands, and ``more``."""
    found = (*failure.sites[:1], *failure.fields.get("producers", ()), *more)
    return tuple(dict.fromkeys(site for site in found if site))


def activations(failure: Failure) -> list[Operand]:
    return [operand for operand in failure.fields.get("operands", ()) if "kind" not in operand]


def why_autocast_did_not_act(trace: Trace, failure: Failure) -> Why:
    """Nothing is guessed: the source around the crash decides, then the step that was watched or replayed; what
    neither of them settles is ``unknown``."""
    fields = failure.fields
    if fields.get("in_place") or fields.get("out"):
        how = "writes in place" if fields.get("in_place") else "writes to `out=`"
        return Why("in-place-or-out", f"the operation {how}, and autocast never casts for such a one")
    sharded = _by_policy(trace, failure)
    if sharded is not None:
        return sharded
    stored = [o for o in fields.get("operands", ()) if "kind" in o and "expression" not in o]
    low = [operand for operand in stored if operand["dtype"] in LOW_PRECISION]
    if low:
        names = ", ".join(operand["name"] for operand in low)
        return Why("parameter-not-float32", f"{names} {'is' if len(low) == 1 else 'are'} {low[0]['dtype']} already")
    function = fields.get("function")
    if function is not None:
        return Why("custom-function", _function_words(function), function["site"])
    if fields.get("thread"):
        return Why("other-thread", "autocast is entered for one thread, and this line ran in another")
    return (
        _by_death(trace, failure)
        or _by_source(failure)
        or _by_habit(trace, failure)
        or Why("unknown", "why autocast did not act could not be told")
    )


def _by_policy(trace: Trace, failure: Failure) -> Why | None:
    """By the policies of a sharded model: what they cast parameters to, the inputs of some module are not."""
    operands: Sequence[Operand] = failure.fields.get("operands", ())
    stored = next((operand for operand in operands if operand.get("kind") == "parameter"), None)
    given = next((operand for operand in operands if "kind" not in operand), None)
    if stored is None or given is None or trace.model is None or not casts_by_policy(trace):
        return None
    module = stored["name"].rpartition(".")[0]
    policy = trace.model.policy_of(module)
    cast = f"`{given['name']}.to({_attribute(stored['name'])}.dtype)`"
    owner = f"`{policy.module}`" if policy is not None and policy.module else "the model itself"
    if policy is not None and policy.dtype == stored["dtype"]:
        how = "" if policy.casts_inputs else ", and cast_forward_inputs=False leaves its inputs as they come"
        words = f"{policy.source} of {owner} makes {stored['name']} {policy.dtype}{how}"
        drop = "" if policy.casts_inputs else "drop `cast_forward_inputs=False` from the policy, or "
        way = _capital(f"{drop}cast the input: {cast}")
    elif stored["dtype"] == "float32" and (policy is None or policy.dtype is None):
        lacks = f"{owner} is sharded without a policy" if policy is not None else f"no policy covers {module}"
        words = f"{lacks}, so that {stored['name']} stays float32 and its inputs as they come"
        way = f"Give `fully_shard(...)` the `mp_policy=` of the rest for {owner if policy else module}, or cast: {cast}"
    else:
        return None
    return Why("sharding-policy", words, None, f"{way}.")


def _function_words(function: Mapping[str, Any]) -> str:
    name = f"`{function['name']}.{function['method']}`"
    if function["method"] == "backward":
        lacks = "" if function["custom_bwd"] else ", which `custom_bwd` does not decorate"
        return f"{name} is the backward of a custom autograd.Function{lacks}: autocast is off there"
    if function["custom_fwd"] and function["cast_inputs"] is None:
        return f"`custom_fwd` decorates {name} without `cast_inputs`, and so casts nothing"
    return f"{name} belongs to a custom autograd.Function, whose inputs nobody casts"


def _by_death(trace: Trace, failure: Failure) -> Why | None:
    """By what the step that died showed: the regions that the exception left, and the call it ended."""
    step = _step(trace, failure)
    if step is None:
        return None
    raised = {f"{kind}: {message}" for kind, message in failure.chain}
    device = _device_type(failure.fields.get("operands", ())) or (trace.model.device_type if trace.model else "cuda")
    left = [region for region in reversed(step.regions) if region.left_by in raised]
    call = _ended_call(step, failure)
    around = left or (list(step.around(call.region)) if call is not None else [])
    acting = next((region for region in around if region.is_for(device)), None)
    if acting is not None:
        return _while_on(failure) if acting.enabled else _disabled(acting.site)
    if call is not None and call.autocast.enabled:
        return _while_on(failure)
    if call is None and step.died_of not in raised:
        return None
    # A region that was entered before the watch began is seen in the calls alone.
    if call is None and any(one.region is None and one.autocast.enabled for one in step.calls):
        return None
    return _never_entered(device, [region.device_type for region in around], around[0].site if around else None)


def _by_source(failure: Failure) -> Why | None:
    """By the `with` statements whose blocks hold the crash."""
    fields = failure.fields
    device = _device_type(fields.get("operands", ()))
    around: Sequence[Mapping[str, Any]] = fields.get("regions", ())
    acting = next((region for region in around if region["device_type"] in (device, None)), None)
    if device is None or (acting is not None and acting["device_type"] is None):
        return None
    if acting is not None:
        if acting["enabled"] is False:
            return _disabled(acting["site"])
        return _while_on(failure) if acting["enabled"] else None
    if fields.get("opaque_regions"):
        return None
    return _never_entered(device, [one["device_type"] for one in around], around[0]["site"] if around else None)


def _by_habit(trace: Trace, failure: Failure) -> Why | None:
    """By the module's calls in an earlier step that was watched, where they agree."""
    step = _step(trace, failure)
    calls = _calls(step, failure) if step is not None else []
    if step is None or len({(call.autocast.enabled, call.region) for call in calls}) != 1:
        return None
    call = calls[0]
    if call.autocast.enabled:
        return _while_on(failure)
    around = list(step.around(call.region))
    off = next((region for region in around if region.is_for(call.autocast.device_type) and not region.enabled), None)
    if off is not None:
        return _disabled(off.site)
    devices = [region.device_type for region in around]
    return _never_entered(call.autocast.device_type, devices, around[0].site if around else None)


def _while_on(failure: Failure) -> Why:
    """Autocast was on, and did not act all the same."""
    fields = failure.fields
    if fields.get("autocast_rule") is False:
        return Why("op-unknown-to-autocast", f"autocast is on, and has no rule for {fields['op']}")
    double = [operand for operand in fields.get("operands", ()) if operand["dtype"] == "float64"]
    if double and "float64" in fields.get("dtypes", ()):
        names = _together(operand["name"] for operand in double)
        return Why("float64-operand", f"autocast is on, and never casts float64, which {names} {be(len(double))}")
    cast = [operand for operand in fields.get("operands", ()) if operand.get("kind") == "parameter"]
    if cast and set(fields.get("dtypes", ())) >= LOW_PRECISION:
        names = _together(operand["name"] for operand in cast)
        words = (
            f"autocast keeps its casts until the outermost region ends, and had made one of {names} in another dtype"
        )
        return Why("cached-cast", words, None, "Give all regions one dtype, or this one `cache_enabled=False`.")
    if fields.get("promotes"):
        low = sorted({operand["dtype"] for operand in fields.get("operands", ()) if operand["dtype"] in LOW_PRECISION})
        words = f"it refuses {' or '.join(low) or 'a dtype that is not its own'} here"
        return Why("promotion-refused", words, None, "Cast to float32 before it, or give all regions one dtype.")
    return Why("unknown", "autocast was on, and why it did not act could not be told")


def _together(names: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(names))


def _disabled(site: Site | None) -> Why:
    return Why("autocast-disabled-here", f"the region{place(site)} turns it off", site)


def _never_entered(device: str, others: Sequence[str], site: Site | None) -> Why:
    if others:
        names = ", ".join(sorted(set(others)))
        words = f"the region around it is for {names}, and the operands are on {device}"
        return Why("autocast-never-entered", words, site)
    return Why("autocast-never-entered", "no autocast region is around it")


def _step(trace: Trace, failure: Failure) -> StepTrace | None:
    evaluating = failure.phase.startswith(("eval", "val", "test", "predict", "sanity"))
    return trace.evaluation if evaluating else trace.training


def _calls(step: StepTrace, failure: Failure) -> list[ModuleCall]:
    backward = failure.phase == "backward"
    return [c for c in step.calls if c.module == failure.module and c.module is not None and c.in_backward is backward]


def _ended_call(step: StepTrace, failure: Failure) -> ModuleCall | None:
    """The call of the module that did not return: it has no outputs."""
    return next((call for call in reversed(_calls(step, failure)) if not call.outputs), None) if step.complete else None


def _device_type(operands: Iterable[Operand]) -> str | None:
    devices = {operand["device"].partition(":")[0] for operand in operands if operand.get("device")}
    return devices.pop() if len(devices) == 1 else None


def cast_fix(failure: Failure, why: Why) -> str:
    """Up to two ways out for operands that do not agree, in the names of this crash."""
    if why.fix:
        return why.fix
    operands: Sequence[Operand] = failure.fields.get("operands", ())
    low = [operand for operand in operands if operand["dtype"] in LOW_PRECISION]
    high = [operand for operand in operands if operand["dtype"] not in LOW_PRECISION]
    function = failure.fields.get("function")
    device = _device_type(operands) or "cuda"
    if why.reason == "custom-function" and function is not None:
        return function_fix(function, device)
    if why.reason == "parameter-not-float32":
        cast = next((operand["name"] for operand in high if "kind" not in operand), "the input")
        weight = next(operand["name"] for operand in low if "kind" in operand)
        casting = f"`{cast}.to({_attribute(weight)}.dtype)`"
        return f"Keep {weight} float32 and let autocast cast it, or cast the input: {casting}."
    casting = _cast_call(low, high)
    if why.reason == "autocast-disabled-here":
        return f"{casting}, or leave the region{place(why.site)} out so that autocast casts for it."
    if why.reason == "float64-operand":
        double = [operand["name"] for operand in operands if operand["dtype"] == "float64"]
        return (
            "Cast to float32 before it, or where it is made: " + ", ".join(f"`{name}.float()`" for name in double) + "."
        )
    if why.reason == "autocast-never-entered":
        entered = next((o["dtype"] for o in low if "kind" not in o), "float16")
        return f"Run it inside `with torch.autocast({device!r}, dtype=torch.{entered}):`, or {_lower(casting)}."
    if why.reason == "other-thread":
        return f"Enter `torch.autocast({device!r}, ...)` inside the function that the thread runs."
    return f"{casting}."


def _cast_call(low: Sequence[Operand], high: Sequence[Operand]) -> str:
    """Cast what is easily cast: the activations to float32, or the tensor that was forgotten among casts."""
    cast_already = [operand for operand in low if "expression" in operand]
    stored = [operand for operand in high if "kind" in operand]
    if cast_already and stored:
        names = " and ".join(_attribute(operand["name"]) for operand in stored)
        like = next((operand["name"] for operand in low if "expression" not in operand), "x")
        return f"Cast {names} as the others are: `.to({like}.dtype)`"
    made = [operand["name"] for operand in low if "kind" not in operand and "library" not in operand]
    if made:
        return "Cast to float32 before it: " + ", ".join(f"`{name}.float()`" for name in made)
    return "Give all operands one dtype before it"


def function_fix(function: Mapping[str, Any], device: str) -> str:
    """The decorators a custom function needs."""
    if function.get("setup_context"):
        return (
            f"Make `{function['name']}.forward` take `ctx` (drop `setup_context`) and decorate it with "
            f"`@torch.amp.custom_fwd(device_type={device!r}, cast_inputs=torch.float32)`."
        )
    if function.get("method") == "backward":
        return (
            f"Decorate `{function['name']}.forward` with `@torch.amp.custom_fwd(device_type={device!r})` and its "
            f"`backward` with `@torch.amp.custom_bwd(device_type={device!r})`."
        )
    return (
        f"Decorate `{function['name']}.forward` with `@torch.amp.custom_fwd(device_type={device!r}, "
        f"cast_inputs=torch.float32)` and its `backward` with `@torch.amp.custom_bwd(device_type={device!r})`."
    )


def _attribute(name: str) -> str:
    return f"self.{name.rpartition('.')[2]}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
