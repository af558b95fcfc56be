from collections.abc import Iterator

from ampcheck.rules._words import count, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import CapturedCasts, Site, Trace


@rule(
    "AMP604",
    Severity.WARNING,
    fix="Export outside the autocast region, and choose the precision where the model is deployed.",
    needs=("comparison",),
)
def autocast_captured_in_trace(trace: Trace) -> Iterator[Evidence]:
    """Autocast's casts are part of the exported graph, or half precision makes it sum otherwise.

    What it does
        Counts by module the casts to float16 and bfloat16 that the graph makes and the eager model, as it was run,
        does not. And where a low-precision export differs, compares both in float32: where they agree there, the
        difference is one of rounding.

    Why is this bad?
        The precision of the exported model is fixed, on every device it will run on. Casts of weights are repeated
        in every call, and a runtime that sums in another order gives other results in half precision. Where a
        weight is used twice, tracing itself dies of `Cannot insert a Tensor that requires grad as a constant`: autocast
        keeps the weight that it cast, unless it is entered with `cache_enabled=False`.

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
            f"The {comparison.second} accumulates otherwise than the eager model: the two differ by rounding alone "
            f"(relative errors against float32: {theirs:.2g} exported, {ours:.2g} eager).",
            module=comparison.culprit,
            data={"relative_exported": theirs, "relative_eager": ours},
            fix="Export in float32, or keep normalization, softmax and attention of the exported model in float32.",
        )


def _lines(casts: list[CapturedCasts]) -> tuple[Site, ...]:
    """The first three lines."""
    by_line = {(site.file, site.line): site for site in reversed(places(cast.site for cast in casts))}
    return tuple(by_line.values())[::-1][:3]
