from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace

# A fresh scaler halves its scale up to so often before the first step.
_SEARCH = 16
_FEW, _MANY = 2, 0.05


@rule(
    "AMP512",
    Severity.INFO,
    fix="Look at `scaler.get_scale()` over time: a scale that keeps falling means that the loss or a gradient is not "
    "finite whatever the scale; `numerics='guard'` names the op.",
    needs=("skips",),
)
def steps_skipped(trace: Trace) -> Iterator[Evidence]:
    """The gradient scaler skipped optimizer steps.

    What it does
        Compares the optimizer's own count of steps with the number of steps that were asked for. A few skips are
        normal: a fresh scaler searches its scale, and tries a larger one every 2000 steps. Many are a warning.

    Why is this bad?
        In a skipped step nothing is learned. PyTorch does not say that it skips.

    Example
        ```python
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
        ```

    Use instead
        ```python
        scaler = torch.amp.GradScaler(device)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.amp.GradScaler
    """
    skips = trace.skips
    if skips is None or skips.skipped == 0 or skips.steps == 0:
        return
    collapsed = skips.scale_now is not None and skips.scale_now < 1
    share = skips.skipped / skips.steps
    if (share <= _MANY or skips.skipped <= _FEW) and not collapsed:
        return
    searching = skips.skipped <= min(_SEARCH, skips.steps - 1) and not collapsed and skips.skipped <= skips.steps // 2
    scale = ""
    if skips.scale_before is not None and skips.scale_now is not None:
        scale = f"; its scale went from {skips.scale_before:g} to {skips.scale_now:g}"
    yield Evidence(
        f"The scaler skipped {'' if skips.exact else 'at least '}{skips.skipped} of {skips.steps} optimizer steps"
        f"{scale}.",
        severity=Severity.INFO if searching else Severity.WARNING,
        data={
            "skipped": skips.skipped,
            "steps": skips.steps,
            "scale_before": skips.scale_before,
            "scale_now": skips.scale_now,
            "exact": skips.exact,
        },
    )
