from collections.abc import Iterator

from ampcheck.rules._facts import in_force, optimized, scaling, trainable
from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP302",
    Severity.INFO,
    fix="Enable the scaler only for float16: `torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)`.",
    needs=("model",),
)
def needless_grad_scaler(trace: Trace) -> Iterator[Evidence]:
    """A gradient scaler is enabled with bfloat16 or float32.

    What it does
        Looks for an enabled scaler if autocast runs in bfloat16, or if float32 or bfloat16 without autocast was
        declared. It is an error for trainable bfloat16 parameters on CUDA.

    Why is this bad?
        bfloat16 and float32 have the range that gradients need, so nothing is lost without scaling. The scaler costs a
        pass over all gradients per step, and may skip steps. On CUDA it has no kernel for bfloat16 gradients:
        `"_amp_foreach_non_finite_check_and_unscale_cuda" not implemented for 'BFloat16'`.

    Example
        ```python
        scaler = torch.amp.GradScaler("cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        loss.backward()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
        - https://github.com/pytorch/pytorch/issues/127176
        - https://github.com/decoderesearch/SAELens/pull/723
    """
    assert trace.model is not None
    precision, scaler = trace.precision, trace.scaler
    if scaler is None or not scaling(trace):
        return
    names = [parameter.name for parameter in trainable(trace.model) if parameter.dtype == "bfloat16"]
    if names and trace.model.device_type == "cuda" and optimized(trace, "bfloat16"):
        yield Evidence(
            f"The {scaler.type} is enabled, but it has no CUDA kernel for the gradients of "
            f"{count(len(names), 'trainable bfloat16 parameter')}: {some(names)}.",
            data={"dtype": "bfloat16", "parameters": names},
            severity=Severity.ERROR,
        )
        return
    dtype = precision.effective_dtype or precision.dtype
    if precision.mode == "true":
        dtype = dtype or "float32"
    elif precision.by == "autocast" and dtype != "float16" and trace.training is not None:
        dtypes = in_force(trace.training)
        dtype = "bfloat16" if dtypes and "float16" not in dtypes else None
    if dtype is not None and dtype != "float16":
        how = "autocast" if precision.mode == "unknown" else precision.mode
        yield Evidence(
            f"The {scaler.type} is enabled, but {how} {dtype} needs no loss scaling.",
            data={"dtype": dtype},
        )
