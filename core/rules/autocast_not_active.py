from collections.abc import Iterator

from ampcheck.rules._facts import (
    around_losses_only,
    casts_by_policy,
    covered,
    in_force,
    misplaced_regions,
    scaling,
    trainable,
    wants_mixed,
)
from ampcheck.rules._words import count, place, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastRegion, Trace


@rule(
    "AMP101",
    Severity.ERROR,
    fix="Run the forward pass and the loss inside `with torch.autocast(device_type, dtype=...):`.",
    needs=("model", "training"),
)
def autocast_not_active(trace: Trace) -> Iterator[Evidence]:
    """Mixed precision was asked for, but the training forward ran without autocast.

    What it does
        Compares the declared precision with the autocast state at each module call of the watched training step. If
        no precision is declared, an enabled gradient scaler counts as asking for it, and so does autocast around the
        loss alone. AMP103 reports regions for another device type, and regions that PyTorch switched off. It is
        information if mixed precision was a default that nobody chose, and a warning if a region held no module call
        but may have been entered inside one, and if the model is compiled. A sharded model whose policy casts to low
        precision needs no autocast.

    Why is this bad?
        The run trains in float32: correct, but with the speed and memory of float32. PyTorch does not say so.

    Example
        ```python
        scaler = torch.amp.GradScaler(device)
        loss = criterion(model(images), labels)
        scaler.scale(loss).backward()
        ```

    Use instead
        ```python
        with torch.autocast(device, dtype=torch.float16):
            loss = criterion(model(images), labels)
        scaler.scale(loss).backward()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocasting
        - https://docs.pytorch.org/tutorials/recipes/recipes/amp_recipe.html
    """
    assert trace.model is not None
    assert trace.training is not None
    precision, model, step = trace.precision, trace.model, trace.training
    if casts_by_policy(trace):
        return
    only_losses = around_losses_only(step)
    if precision.mixed:
        source = f" by {precision.source}" if precision.source else ""
        asked = f"Mixed {precision.dtype or 'precision'} was asked for{source}"
    elif (wants_mixed(trace) or only_losses) and any(parameter.dtype == "float32" for parameter in trainable(model)):
        wanted = "An enabled gradient scaler" if scaling(trace) else "Autocast around the loss"
        asked = f"{wanted} shows that mixed precision was wanted"
    else:
        return
    calls = sum(call.count for call in step.forward)
    misplaced = misplaced_regions(trace)
    if not calls or (in_force(step) and not only_losses) or (misplaced and covered(step, misplaced) >= 0.5):
        return
    regions = tuple({(r.device_type, r.enabled, r.site): r for r in step.regions}.values())
    entered = f" Autocast was entered {some(_spelled(region) for region in regions)}." if regions else ""
    unseen = " Part of the model is compiled, and AmpCheck cannot look into compiled code." if model.compiled else ""
    around_calls = {region.index for call in step.calls for region in step.around(call.region)}
    around_nothing = not only_losses and any(
        region.enabled and region.is_for(model.device_type) and region.index not in around_calls
        for region in step.regions
    )
    doubtful = around_nothing or model.compiled or not precision.explicit
    by_default = precision.mixed and not precision.explicit
    yield Evidence(
        f"{asked}, but none of the {count(calls, 'module call')} of the training step ran under autocast"
        f"{f', only {some(only_losses)}' if only_losses else ''}."
        f"{entered}{unseen}",
        sites=places(region.site for region in regions),
        data={"module_calls": calls, "asked_dtype": precision.dtype},
        severity=Severity.INFO if by_default else Severity.WARNING if doubtful else None,
    )


def _spelled(region: AutocastRegion) -> str:
    return f"with enabled={region.enabled} for {region.device_type}{place(region.site)}"
