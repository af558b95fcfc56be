from collections.abc import Iterator

from ampcheck.rules._facts import trainable
from ampcheck.rules._words import count, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastRegion, ModuleCall, StepTrace, Trace


@rule(
    "AMP109",
    Severity.ERROR,
    fix="Run the pass without gradients in its own autocast region, with `cache_enabled=False`, before the region of "
    "the training forward; or call `torch.clear_autocast_cache()` right after that pass.",
    needs=("model", "training", "uncompiled"),
)
def autocast_cache_under_no_grad(trace: Trace) -> Iterator[Evidence]:
    """Weights that autocast cached under `no_grad` lose their gradients.

    What it does
        On PyTorch versions that have this bug, looks for modules with a trainable float32 weight matrix or kernel that
        ran without gradients first, and with gradients later, inside the same outermost autocast region with the
        weight cache on. AmpCheck tries the bug to find out whether the installed version has it.

    Why is this bad?
        Autocast keeps the low-precision copy of a weight until the outermost region ends. A copy made under `no_grad`
        has no history: the later pass uses it, backward stops there, and the parameter gets no gradient. Nothing
        raises, unless distributed training complains about unused parameters.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            with torch.no_grad():
                target = model(weak)
            loss = criterion(model(strong), target)
        ```

    Use instead
        ```python
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
            target = model(weak)
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(model(strong), target)
        ```

    References
        - https://github.com/pytorch/pytorch/issues/158232
        - https://github.com/pytorch/pytorch/issues/112583
        - https://github.com/pytorch/pytorch/pull/165068
    """
    assert trace.model is not None
    assert trace.training is not None
    step = trace.training
    if not trace.environment.autocast_cache_fault or step.cache_cleared:
        return
    # Autocast casts the weights of products and convolutions; those of normalization have one dimension.
    cast = (p for p in trainable(trace.model) if p.dtype == "float32" and len(p.shape) > 1)
    owners = {parameter.name.rpartition(".")[0] for parameter in cast}
    graded: dict[tuple[str | None, int | None], bool] = {}
    lost: dict[str, AutocastRegion | None] = {}
    for call in step.calls:
        cached = call.autocast.enabled and call.autocast.cache and call.autocast.dtype in call.outputs
        if call.module not in owners or not call.leaf or not cached or call.in_backward:
            continue
        outermost = _outermost(step, call)
        first = graded.setdefault((call.module, outermost.index if outermost else None), call.grad_enabled)
        if call.grad_enabled and not first:
            lost[call.module or call.type] = outermost
    if lost:
        yield Evidence(
            f"The weights of {count(len(lost), 'module')} get no gradient: {some(lost)} ran without gradients first, "
            "then with gradients inside the same autocast region, which reused the weights it had cast.",
            module=next(iter(lost)) if len(lost) == 1 else None,
            sites=places(region.site for region in lost.values() if region),
            data={"modules": list(lost)},
        )


def _outermost(step: StepTrace, call: ModuleCall) -> AutocastRegion | None:
    """The outermost region around a call: the one whose end empties the cache."""
    return next(reversed(list(step.around(call.region))), None)
