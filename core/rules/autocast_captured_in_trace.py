from collections.abc import Iterator

from ampcheck.rules._words import count, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import CapturedCasts, Site, Trace


@rule(
    "AMP604",
    Severity.WARNING,
    fix="Export outside the autocast region, and set the precision in the runtime that runs the model.",
    needs=("comparison",),
)
def autocast_captured_in_trace(trace: Trace) -> Iterator[Evidence]:
    """The export contains autocast's casts, or differs from eager only by low-precision rounding.

    What it does
        Counts, per module, the casts to float16 and bfloat16 that the graph makes and that the eager model did not
        make when it ran. If a low-precision export differs, also compares both models in float32: if they agree there,
        rounding causes the difference.

    Why is this bad?
        The casts fix the precision of the exported model on every device. Casts of weights repeat in every call, and
        a runtime that sums in another order gives other results in half precision. If a weight is used twice, tracing
        itself fails with `Cannot insert a Tensor that requires grad as a constant`, because autocast caches the weight
        that it cast, unless the region has `cache_enabled=False`.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            exported = torch.jit.trace(model, example)
        ```

    Use instead
        ```python
        with torch.no_grad():
            exported = torch.jit.trace(model.float(), example)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocasting
        - https://github.com/pytorch/pytorch/issues/84092
    """
    comparison = trace.comparison
    assert comparison is not None
    by_dtype: dict[str, list[CapturedCasts]] = {}
    for cast in comparison.casts:
        by_dtype.setdefault(cast.dtype, []).append(cast)
    for dtype, casts in by_dtype.items():
        total = sum(cast.count for cast in casts)
        modules = [cast.module or "the model" for cast in casts]
        yield Evidence(
            f"The {comparison.second} makes {count(total, 'cast')} to {dtype} that the eager model does not make, in "
            f"{some(modules)}: it was exported under autocast.",
            module=casts[0].module if len(casts) == 1 else None,
            sites=_lines(casts),
            data={"dtype": dtype, "casts": {cast.module: cast.count for cast in casts}},
        )
    if comparison.rounding is not None:
        ours, theirs = comparison.rounding
        yield Evidence(
            f"The {comparison.second} rounds differently from the eager model, and nothing else differs "
            f"(relative errors against float32: {theirs:.2g} exported, {ours:.2g} eager).",
            module=comparison.culprit,
            data={"relative_exported": theirs, "relative_eager": ours},
            fix="Export in float32, or keep the normalization, softmax and attention of the export in float32.",
        )


def _lines(casts: list[CapturedCasts]) -> tuple[Site, ...]:
    """The first three lines."""
    by_line = {(site.file, site.line): site for site in reversed(places(cast.site for cast in casts))}
    return tuple(by_line.values())[::-1][:3]
