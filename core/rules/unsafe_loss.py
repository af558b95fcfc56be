from collections.abc import Iterator

from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import OpCall, Trace


@rule(
    "AMP210",
    Severity.WARNING,
    fix="Pass logits to `F.binary_cross_entropy_with_logits` if the probability comes straight from one sigmoid; else "
    "compute this loss under `torch.autocast(device_type, enabled=False)` on `.float()` inputs.",
    needs=("training", "uncompiled"),
)
def unsafe_loss(trace: Trace) -> Iterator[Evidence]:
    """`binary_cross_entropy` or `BCELoss` runs under autocast.

    What it does
        Looks for calls of `binary_cross_entropy`, which `nn.BCELoss` makes too, with autocast on. It is an error on
        CUDA.

    Why is this bad?
        Autocast on CUDA refuses the call: `binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast`. Autocast
        on the CPU computes it in float32, so the code works until it meets a GPU. A prediction that a float16 sigmoid
        rounded to 0 or 1 is beyond repair by then.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.binary_cross_entropy(torch.sigmoid(model(images)), labels)
        ```

    Use instead
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.binary_cross_entropy_with_logits(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#prefer-binary-cross-entropy-with-logits-over-binary-cross-entropy
        - https://github.com/pytorch/pytorch/issues/61098
        - https://github.com/Megvii-BaseDetection/YOLOX/issues/336
    """
    assert trace.training is not None
    by_module: dict[str | None, list[OpCall]] = {}
    for op in trace.training.ops:
        if op.op == "binary_cross_entropy" and op.autocast.enabled:
            by_module.setdefault(op.module, []).append(op)
    for module, calls in by_module.items():
        state = calls[0].autocast
        total = sum(call.count for call in calls)
        inside = f" in {module}" if module else ""
        yield Evidence(
            f"binary_cross_entropy was called {count(total, 'time')}{inside} under autocast {state.dtype} on "
            f"{state.device_type}{place(calls[0].site)}.",
            module=module,
            sites=places(call.site for call in calls),
            data={"calls": total, "device_type": state.device_type, "dtype": state.dtype},
            severity=Severity.ERROR if state.device_type == "cuda" else None,
        )
