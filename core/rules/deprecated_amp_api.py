from collections.abc import Iterator

from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastRegion, Trace


@rule(
    "AMP108",
    Severity.INFO,
    fix='Write `torch.autocast("cuda", ...)` and `torch.amp.GradScaler("cuda", ...)`; only these take the device type.',
)
def deprecated_amp_api(trace: Trace) -> Iterator[Evidence]:
    """The code uses `torch.cuda.amp` or another deprecated spelling.

    What it does
        Looks for autocast regions of a deprecated class that the user's own code entered in the watched steps, and,
        unless a framework made the scaler, for a gradient scaler of a deprecated class.

    Why is this bad?
        The old classes are fixed to one device type, warn on every construction since PyTorch 2.4, and will be
        removed. Half-converted code is worse: `torch.cuda.amp.GradScaler("cuda")` reads `"cuda"` as the initial scale,
        and `torch.cuda.amp.autocast(device_type="cuda")` raises.

    Example
        ```python
        scaler = torch.cuda.amp.GradScaler()
        with torch.cuda.amp.autocast():
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        scaler = torch.amp.GradScaler("cuda")
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html
        - https://github.com/pytorch/ignite/issues/3304
        - https://github.com/MIC-DKFZ/nnUNet/issues/2735
    """
    regions: dict[str, list[AutocastRegion]] = {}
    for step in (trace.training, trace.evaluation):
        for region in step.regions if step else ():
            if region.deprecated and region.by_user:
                regions.setdefault(region.deprecated, []).append(region)
    for old, entered in regions.items():
        sites = places(region.site for region in entered)
        where = f" and {count(len(sites) - 1, 'other line')}" if len(sites) > 1 else ""
        yield Evidence(
            f"The deprecated {old} was entered{place(sites[0]) if sites else ''}{where}.",
            sites=sites,
            data={"api": old, "entered": len(entered)},
        )
    if trace.host is None and trace.scaler is not None and trace.scaler.deprecated:
        yield Evidence(
            f"The gradient scaler is a deprecated {trace.scaler.deprecated}.", data={"api": trace.scaler.deprecated}
        )
