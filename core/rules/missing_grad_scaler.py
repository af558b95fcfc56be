from collections.abc import Iterator

from ampcheck.rules._facts import in_force, scaling
from ampcheck.rules._words import count
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP301",
    Severity.WARNING,
    fix="Scale the loss with an enabled `torch.amp.GradScaler(device_type)`, or use bfloat16 if the device has it.",
)
def missing_grad_scaler(trace: Trace) -> Iterator[Evidence]:
    """Autocast runs in float16 without an enabled gradient scaler.

    What it does
        Compares the scaler with the autocast dtype in force or, before any step has been watched, with the declared
        dtype.

    Why is this bad?
        Gradients below 6e-8 become zero in float16, and late in training many are that small. The loss curve flattens
        early, and nothing raises.

    Example
        ```python
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        ```

    Use instead
        ```python
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
        - https://github.com/karpathy/nanoGPT/pull/87
    """
    precision = trace.precision
    if scaling(trace) or (trace.scaler is None and precision.scaler):
        return
    scaler = "no gradient scaler" if trace.scaler is None else f"a disabled {trace.scaler.type}"
    declared = precision.mixed and (precision.effective_dtype or precision.dtype) == "float16"
    calls = in_force(trace.training)["float16"]
    seen_otherwise = trace.training is not None and precision.by == "autocast"
    if not calls and not (declared and not seen_otherwise):
        return
    if declared:
        seen = f"Mixed float16 was asked for{f' by {precision.source}' if precision.source else ''}"
    else:
        seen = f"{count(calls, 'module call')} of the training step ran under autocast float16"
    yield Evidence(f"{seen}, with {scaler}.", data={"scaler": None if trace.scaler is None else trace.scaler.type})
