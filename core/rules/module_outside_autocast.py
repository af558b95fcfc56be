from collections.abc import Iterator

from ampcheck.rules._facts import around_losses_only, in_force
from ampcheck.rules._words import count, place, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastRegion, ModuleCall, Site, StepTrace, Trace


@rule(
    "AMP110",
    Severity.INFO,
    fix="Leave it if you want float32 there; otherwise run the module inside the autocast region.",
    needs=("training", "uncompiled"),
)
def module_outside_autocast(trace: Trace) -> Iterator[Evidence]:
    """Modules ran with autocast off while the rest ran with it on.

    What it does
        Lists the modules of the watched training step that ran with autocast off while others ran with it on, grouped
        by the line that turned it off. Of nested modules, names the outermost. Skips modules that enter autocast
        inside their own forward.

    Why is this bad?
        Often it is intended: a loss or an attention in float32 is good practice. Otherwise it costs speed and memory,
        and a module with autocast off gets low-precision inputs unless somebody calls `.float()`.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            features = backbone(images)
        logits = head(features.float())
        ```

    Use instead
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            logits = head(backbone(images))
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocasting
    """
    assert trace.training is not None
    step = trace.training
    on = in_force(step)
    if not on or around_losses_only(step):
        return
    entered = {call.module for call in step.forward if call.autocast.enabled and call.module is not None}
    enclosing = {outer for name in entered for outer in _around(name)}
    groups: dict[tuple[bool, Site | None], list[ModuleCall]] = {}
    for call in step.forward:
        if not call.autocast.enabled and (call.leaf if call.module is None else call.module not in enclosing):
            region = _turned_off_by(step, call)
            groups.setdefault((region is not None, region.site if region else None), []).append(call)
    for (turned_off, site), calls in groups.items():
        names = _outermost(calls)
        total = sum(call.count for call in calls)
        how = f"turned off{place(site)}" if turned_off else "off, outside every region that turns it on"
        yield Evidence(
            f"{count(total, 'module call')} ran with autocast {how}, while {sum(on.values())} ran under autocast "
            f"{on.most_common(1)[0][0]}: {some(names)}.",
            module=names[0] if len(names) == 1 and calls[0].module is not None else None,
            sites=places([site]),
            data={"modules": names, "module_calls": total, "module_calls_on": sum(on.values())},
        )


def _turned_off_by(step: StepTrace, call: ModuleCall) -> AutocastRegion | None:
    around = step.around(call.region)
    return next((r for r in around if r.is_for(call.autocast.device_type) and not r.enabled), None)


def _around(name: str) -> set[str]:
    """The qualified names of the modules around a module."""
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(len(parts))} if name else set()


def _outermost(calls: list[ModuleCall]) -> list[str]:
    """Names of the modules that no other of the calls encloses, and types of modules outside the model."""
    named = {call.module for call in calls}
    outermost = (call for call in calls if call.module is None or not _around(call.module) & named)
    return list(dict.fromkeys(call.module or call.type for call in outermost))
