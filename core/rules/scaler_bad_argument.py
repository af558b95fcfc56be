from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ScalerArgument, Trace


@rule(
    "AMP312",
    Severity.ERROR,
    fix='Make the scaler with `torch.amp.GradScaler("cuda")`: its first argument is the device.',
    needs=("failure",),
)
def scaler_bad_argument(trace: Trace) -> Iterator[Evidence]:
    """A `GradScaler` was made with an argument it does not take, or with a device where its scale belongs.

    What it does
        Reads from the scaler what it was made with when its first use fails: the first argument of
        `torch.amp.GradScaler` is a device, that of the older `torch.cuda.amp.GradScaler` the initial scale. Names a
        closure that was handed to `step()`.

    Why is this bad?
        The call that is wrong succeeds; the crash comes at the first `scale()`, with a message about `full()`.

    Example
        ```python
        scaler = torch.cuda.amp.GradScaler("cuda")
        ```

    Use instead
        ```python
        scaler = torch.amp.GradScaler("cuda")
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.amp.GradScaler
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, ScalerArgument):
        return
    facts = failure.facts
    if facts.argument == "closure":
        yield Evidence(
            "`GradScaler.step()` was given a closure. An enabled scaler takes none: it must see the gradients before "
            "the optimizer steps.",
            sites=failure.sites[:1],
            data={"argument": "closure"},
            fix="Scale and run backward first, and call `scaler.step(optimizer)` without a closure; for an optimizer "
            "that needs one (LBFGS, SAM) use bfloat16 without a scaler: `GradScaler(enabled=False)`.",
        )
        return
    if facts.argument != "init_scale":
        yield Evidence(
            f"`GradScaler` does not take `{facts.argument}`.",
            sites=failure.sites[:1],
            data={"argument": facts.argument},
            fix='Write `torch.amp.GradScaler("cuda")`: the device is its first argument, called `device`.',
        )
        return
    value = facts.value or "that is no number"
    device = value if value in ("'cuda'", "'cpu'") else "'cuda'"
    yield Evidence(
        f"`{facts.scaler}` was made with the initial scale {value}, which is no number.",
        sites=failure.sites[:1],
        data={"argument": "init_scale", "value": value},
        fix=f"Make it with `torch.amp.GradScaler({device})`, or pass the scale by name: `init_scale=65536.0`.",
    )
