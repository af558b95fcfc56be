"""What several rules read off a trace."""

import re
from collections import Counter

from ampcheck.precision import FLOATING, LOW_PRECISION
from ampcheck.trace import AutocastRegion, ModelInfo, StepTrace, TensorInfo, Trace

_LOSS = re.compile("(?i)loss|criterion|entropy")


def trainable(model: ModelInfo) -> list[TensorInfo]:
    return [tensor for tensor in model.parameters if tensor.requires_grad]


def in_force(step: StepTrace | None) -> Counter[str]:
    """``StepTrace.in_force``, empty for a step that was not watched."""
    return Counter(step.in_force) if step else Counter()


def around_losses_only(step: StepTrace) -> list[str]:
    """The losses, by type or by the name of their node, that ran under autocast, where nothing else did."""
    inside = [call for call in step.forward if call.autocast.enabled]
    losses = [call.type for call in inside if call.module is None and _LOSS.search(call.type)]
    if len(losses) != len(inside):
        return []
    # Nodes outside any module, in upper case; the rest are calls of functions.
    nodes = [call.op for call in step.ops if call.autocast.enabled and call.module is None and call.op[0].isupper()]
    if not all(map(_LOSS.search, nodes)):
        return []
    return list(dict.fromkeys(losses or nodes))


def scaling(trace: Trace) -> bool:
    return trace.scaler is not None and trace.scaler.enabled


def wants_mixed(trace: Trace) -> bool:
    """Whether mixed precision is declared or, if the user declared nothing, whether a scaler or autocast shows it."""
    precision = trace.precision
    undeclared = precision.mode == "unknown" or not precision.explicit
    return precision.mixed or (undeclared and (scaling(trace) or bool(in_force(trace.training))))


def low_throughout(trace: Trace) -> str | None:
    """The low precision of a model that has it in all parameters and is to run without autocast."""
    if trace.model is None or trace.precision.mixed or trace.scaler is not None:
        return None
    dtypes = {tensor.dtype for tensor in trace.model.parameters if tensor.dtype in FLOATING}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= LOW_PRECISION else None


def casts_by_policy(trace: Trace) -> bool:
    """Whether the model is sharded under a policy that casts to low precision, with or without autocast."""
    return trace.model is not None and any(policy.dtype in LOW_PRECISION for policy in trace.model.policies)


def optimized(trace: Trace, dtype: str) -> bool:
    """Whether an optimizer holds parameters of ``dtype``, as far as the optimizers are known."""
    return not trace.optimizers or any(optimizer.dtypes.get(dtype) for optimizer in trace.optimizers)


def misplaced_regions(trace: Trace) -> tuple[AutocastRegion, ...]:
    """The regions that asked for autocast but gave the model none: they are for another device type, or torch switched
    them off. Empty if autocast was on for the model's device type anywhere in the training step.
    """
    model, step = trace.model, trace.training
    if model is None or step is None or in_force(step):
        return ()
    if any(region.enabled and region.is_for(model.device_type) for region in step.regions):
        return ()
    return tuple(region for region in step.regions if region.enabled or region.requested)


def covered(step: StepTrace, regions: tuple[AutocastRegion, ...]) -> float:
    """The share of the forward pass's module calls that ran inside one of ``regions``."""
    indices = {region.index for region in regions}
    inside = sum(call.count for call in step.forward if any(r.index in indices for r in step.around(call.region)))
    return inside / max(1, sum(call.count for call in step.forward))
