from collections.abc import Iterator

from ampcheck.rules._edits import replacing
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ScalerArgument, Trace


@rule(
    "AMP312",
    Severity.ERROR,
    fix='Write `torch.amp.GradScaler("cuda")`: its first argument is the device.',
    needs=("failure",),
)
def scaler_bad_argument(trace: Trace) -> Iterator[Evidence]:
    """`GradScaler` got an argument it does not take, or a device as its initial scale.

    What it does
        Reads the scaler's arguments from the scaler when its first use fails: the first argument of
        `torch.amp.GradScaler` is a device, that of the older `torch.cuda.amp.GradScaler` is the initial scale. Also
        recognises a closure passed to `step()`.

    Why is this bad?
        The wrong call succeeds; the error comes at the first `scale()`, with a message about `full()`.

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
            "`GradScaler.step()` got a closure. An enabled scaler takes none: it must see the gradients before the "
            "optimizer steps.",
            sites=failure.sites[:1],
            data={"argument": "closure"},
            fix="Call `scaler.scale(loss).backward()` first, then `scaler.step(optimizer)` without a closure. For an "
            "optimizer that needs one (LBFGS, SAM), use bfloat16 and `GradScaler(enabled=False)`.",
        )
        return
    if facts.argument != "init_scale":
        made = facts.corrected or 'torch.amp.GradScaler("cuda")'
        yield Evidence(
            f"`GradScaler` does not take `{facts.argument}`.",
            sites=failure.sites[:1],
            data={"argument": facts.argument},
            fix=f"Write `{made}`.",
            edit=replacing(failure.sites[:1], facts.call, facts.corrected),
        )
        return
    value = facts.value or "that is no number"
    device = value if value in ("'cuda'", "'cpu'") else "'cuda'"
    yield Evidence(
        f"`{facts.scaler}` got the initial scale {value}, which is not a number.",
        sites=failure.sites[:1],
        data={"argument": "init_scale", "value": value},
        fix=f"Write `torch.amp.GradScaler({device})`, or pass the scale by name: `init_scale=65536.0`.",
    )
