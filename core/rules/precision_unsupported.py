from collections.abc import Iterator, Sequence

from ampcheck.rules._facts import in_force
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP107",
    Severity.WARNING,
    fix="Use the low-precision dtype that the device supports natively, or train in float32.",
    needs=("model",),
)
def precision_unsupported(trace: Trace) -> Iterator[Evidence]:
    """This device does not support the dtype, or only emulates it.

    What it does
        Asks PyTorch whether the device natively supports the autocast dtype in force or, before any step has been
        watched, the declared dtype.

    Why is this bad?
        An emulated dtype has the rounding of low precision without its speed: each operation converts to float32 and
        back, and optimized kernels are missing. `torch.cuda.is_bf16_supported()` counts emulation as support.

    Example
        ```python
        # a GPU older than Ampere
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast("cuda", dtype=torch.bfloat16 if native else torch.float16):
            loss = criterion(model(images), labels)
        ```

    References
        - https://github.com/pytorch/pytorch/pull/148322
        - https://github.com/pytorch/pytorch/issues/124996
    """
    assert trace.model is not None
    precision, device_type = trace.precision, trace.model.device_type
    if trace.training is None or precision.mode == "true" or precision.by == "policy":
        dtypes = [precision.effective_dtype or precision.dtype]
    else:
        dtypes = list(in_force(trace.training))
    native = [dtype for dtype in ("bfloat16", "float16") if trace.environment.native.get((device_type, dtype))]
    for dtype in dtypes:
        if dtype and trace.environment.native.get((device_type, dtype)) is False:
            yield Evidence(
                f"Training runs in {dtype}, but this {device_type} device does not support it natively: it is "
                "emulated or missing.",
                data={"device_type": device_type, "dtype": dtype},
                fix=_fix(native, device_type),
                situation=next(iter(native), "float32"),
            )


def _fix(native: Sequence[str], device_type: str) -> str:
    if not native:
        return f"Train in float32: this {device_type} device supports neither float16 nor bfloat16 natively."
    scaler = " with a gradient scaler" if native[0] == "float16" else ""
    return f"Use {native[0]}{scaler}, because this {device_type} device supports it natively, or train in float32."
