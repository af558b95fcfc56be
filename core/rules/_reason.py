"""Why autocast did not act on the operation that failed."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._facts import casts_by_policy, low_throughout
from ampcheck.rules._words import be, cast_of, place, sentence
from ampcheck.trace import (
    CustomFunction,
    DtypeMismatch,
    FailedOperand,
    FailedOperation,
    Failure,
    ModuleCall,
    Site,
    StepTrace,
    Trace,
)

Reason = Literal[
    "in-place-or-out",
    "sharding-policy",
    "parameter-not-float32",
    "custom-function",
    "other-thread",
    "autocast-disabled-here",
    "autocast-never-entered",
    "op-unknown-to-autocast",
    "float64-operand",
    "cached-cast",
    "promotion-refused",
    "unknown",
]


class Why(NamedTuple):
    """A reason of the report's format, in words, with the line behind it and a fix if this reason has its own.
    ``by_host``: no line of the user's is behind it."""

    reason: Reason
    words: str
    site: Site | None = None
    fix: str = ""
    by_host: bool = False


def why_autocast_did_not_act(trace: Trace, failure: Failure, mismatch: DtypeMismatch) -> Why:
    """Why autocast did not act, without guessing: the source around the crash decides, then the step that was watched
    or replayed. What neither of them settles is ``unknown``."""
    operation = mismatch.operation
    if operation.in_place or operation.out:
        how = "writes in place" if operation.in_place else "writes to `out=`"
        return Why("in-place-or-out", f"the operation {how}, and autocast never casts for that")
    sharded = _by_policy(trace, operation)
    if sharded is not None:
        return sharded
    low = [
        operand
        for operand in operation.operands
        if operand.stored and operand.expression is None and operand.dtype in LOW_PRECISION
    ]
    if low:
        names = ", ".join(operand.name for operand in low)
        whole = ", as the whole model is" if low_throughout(trace) else ""
        return Why("parameter-not-float32", f"{names} {be(len(low))} already {low[0].dtype}{whole}")
    if operation.function is not None:
        return Why("custom-function", _function_words(operation.function), operation.function.site)
    if operation.thread:
        return Why("other-thread", "autocast is on in one thread only, and this line ran in another")
    return (
        _by_death(trace, failure, mismatch)
        or _by_source(mismatch)
        or _by_habit(trace, failure, mismatch)
        or Why("unknown", "the reason is unknown")
    )


def _by_policy(trace: Trace, operation: FailedOperation) -> Why | None:
    """By the policies of a sharded model: they cast the parameters of a module but not its inputs, or neither."""
    stored = next((operand for operand in operation.operands if operand.stored == "parameter"), None)
    given = next((operand for operand in operation.operands if not operand.stored), None)
    if stored is None or given is None or trace.model is None or not casts_by_policy(trace):
        return None
    module = stored.name.rpartition(".")[0]
    policy = trace.model.policy_of(module)
    cast = cast_of(given, f".to(torch.{stored.dtype})")
    owner = f"`{policy.module}`" if policy is not None and policy.module else "the model itself"
    if policy is not None and policy.dtype == stored.dtype:
        how = "" if policy.casts_inputs else ", and cast_forward_inputs=False does not cast its inputs"
        words = f"{policy.source} of {owner} casts {stored.name} to {policy.dtype}{how}"
        drop = "" if policy.casts_inputs else "remove `cast_forward_inputs=False` from the policy, or "
        way = sentence(f"{drop}cast the input: {cast}")
    elif stored.dtype == "float32" and (policy is None or policy.dtype is None):
        lacks = f"{owner} is sharded without a policy" if policy is not None else f"no policy covers {module}"
        words = f"{lacks}, so {stored.name} stays float32 and nothing casts its inputs"
        missing = owner if policy is not None else module
        way = f"Pass the `mp_policy=` of the rest to `fully_shard(...)` of {missing}, or cast the input: {cast}"
    else:
        return None
    return Why("sharding-policy", words, None, f"{way}.")


def _function_words(function: CustomFunction) -> str:
    name = f"`{function.name}.{function.method}`"
    if function.method == "backward":
        lacks = "" if function.custom_bwd else " without `custom_bwd`"
        return f"{name} is the backward of a custom autograd.Function{lacks}, and autocast is off there"
    if function.custom_fwd and function.cast_inputs is None:
        return f"`custom_fwd` decorates {name} without `cast_inputs`, so it casts nothing"
    return f"{name} belongs to a custom autograd.Function, and nothing casts its inputs"


def _by_death(trace: Trace, failure: Failure, mismatch: DtypeMismatch) -> Why | None:
    """By what the failed step showed: the regions that the exception left, and the call that it ended."""
    step = _step(trace, failure)
    if step is None:
        return None
    raised = {f"{kind}: {message}" for kind, message in failure.chain}
    device = device_type(mismatch.operation.operands) or (trace.model.device_type if trace.model else "cuda")
    left = [region for region in reversed(step.regions) if region.left_by in raised]
    call = _ended_call(step, failure)
    around = left or (list(step.around(call.region)) if call is not None else [])
    acting = next((region for region in around if region.is_for(device)), None)
    if acting is not None:
        return _while_on(mismatch) if acting.enabled else _disabled(acting.site, by_host=not acting.by_user)
    if call is not None and call.autocast.enabled:
        return _while_on(mismatch)
    if call is None and step.died_of not in raised:
        return None
    # Of a region that was entered before the watch began, only the calls show anything.
    if call is None and any(one.region is None and one.autocast.enabled for one in step.calls):
        return None
    return _never_entered(device, [region.device_type for region in around], around[0].site if around else None)


def _by_source(mismatch: DtypeMismatch) -> Why | None:
    """By the ``with`` statements around the crash."""
    operation = mismatch.operation
    device, around = device_type(operation.operands), operation.regions
    acting = next((region for region in around if region.device_type in (device, None)), None)
    if device is None or (acting is not None and acting.device_type is None):
        return None
    if acting is not None:
        if acting.enabled is False:
            return _disabled(acting.site)
        return _while_on(mismatch) if acting.enabled else None
    if operation.opaque_regions:
        return None
    others = [region.device_type for region in around if region.device_type is not None]
    return _never_entered(device, others, around[0].site if around else None)


def _by_habit(trace: Trace, failure: Failure, mismatch: DtypeMismatch) -> Why | None:
    """By the module's calls in an earlier watched step, if they agree."""
    step = _step(trace, failure)
    calls = _calls(step, failure) if step is not None else []
    if step is None or len({(call.autocast.enabled, call.region) for call in calls}) != 1:
        return None
    call = calls[0]
    if call.autocast.enabled:
        return _while_on(mismatch)
    around = list(step.around(call.region))
    off = next((region for region in around if region.is_for(call.autocast.device_type) and not region.enabled), None)
    if off is not None:
        return _disabled(off.site, by_host=not off.by_user)
    devices = [region.device_type for region in around]
    return _never_entered(call.autocast.device_type, devices, around[0].site if around else None)


def _while_on(mismatch: DtypeMismatch) -> Why:
    """Why autocast did not act although it was on."""
    operation = mismatch.operation
    if operation.autocast_rule is False:
        return Why("op-unknown-to-autocast", f"autocast is on, but it has no rule for {operation.op}")
    double = [operand for operand in operation.operands if operand.dtype == "float64"]
    if double and "float64" in operation.dtypes:
        words = f"autocast is on, but it never casts float64, and {_together(double)} {be(len(double))} float64"
        return Why("float64-operand", words)
    cast = [operand for operand in operation.operands if operand.stored == "parameter"]
    if cast and set(operation.dtypes) >= LOW_PRECISION:
        words = "autocast caches its casts until the outermost region ends, and it had cached a cast of "
        words += f"{_together(cast)} to another dtype"
        return Why("cached-cast", words, None, "Use one dtype in all regions, or pass `cache_enabled=False` here.")
    if mismatch.promotes:
        low = sorted({operand.dtype for operand in operation.operands if operand.dtype in LOW_PRECISION})
        words = f"it refuses {' or '.join(low) or 'a dtype that is not its own'} here"
        return Why("promotion-refused", words, None, "Cast to float32 first, or use one dtype in all regions.")
    return Why("unknown", "autocast was on, and the reason is unknown")


def _together(operands: Iterable[FailedOperand]) -> str:
    return " and ".join(dict.fromkeys(operand.name for operand in operands))


def _disabled(site: Site | None, *, by_host: bool = False) -> Why:
    return Why("autocast-disabled-here", f"the region{place(site)} turns it off", site, by_host=by_host)


def _never_entered(device: str, others: Sequence[str], site: Site | None) -> Why:
    if others:
        names = ", ".join(sorted(set(others)))
        words = f"the region around this line is for {names}, but the operands are on {device}"
        return Why("autocast-never-entered", words, site)
    return Why("autocast-never-entered", "no autocast region surrounds this line")


def _step(trace: Trace, failure: Failure) -> StepTrace | None:
    evaluating = failure.phase.startswith(("eval", "val", "test", "predict", "sanity"))
    return trace.evaluation if evaluating else trace.training


def _calls(step: StepTrace, failure: Failure) -> list[ModuleCall]:
    backward = failure.phase == "backward"
    return [c for c in step.calls if c.module == failure.module and c.module is not None and c.in_backward is backward]


def _ended_call(step: StepTrace, failure: Failure) -> ModuleCall | None:
    """The call of the module that did not return: the last one without outputs."""
    return next((call for call in reversed(_calls(step, failure)) if not call.outputs), None) if step.complete else None


def device_type(operands: Iterable[FailedOperand]) -> str | None:
    """The device type of the operands, if they share one."""
    devices = {operand.device_type for operand in operands if operand.device_type}
    return devices.pop() if len(devices) == 1 else None
