from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._facts import covered, misplaced_regions
from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import AutocastRegion, ModelInfo, Trace


@rule(
    "AMP103",
    Severity.ERROR,
    fix="Enter the region for the model's device type, with a dtype that autocast supports there: "
    "`torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16)`.",
    needs=("model", "training"),
)
def autocast_wrong_device(trace: Trace) -> Iterator[Evidence]:
    """An autocast region is for another device type than the model's, or PyTorch switched it off.

    What it does
        If the training forward ran with autocast off, looks for regions that asked for autocast: regions for another
        device type than that of the parameters, and regions that PyTorch disabled on creation because the device or
        the dtype is not available. Skips such regions inside a forward pass that does run under autocast. It is a
        warning if no mixed precision was declared and the region covers a small part of the forward pass, or asked for
        float32.

    Why is this bad?
        The region does nothing: the run trains in float32. PyTorch warns once at most, and says nothing at all for
        `autocast("cuda:0")` without CUDA.

    Example
        ```python
        model = Net()  # on the CPU
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = criterion(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.autocast
        - https://github.com/kohya-ss/musubi-tuner/issues/738
        - https://github.com/meituan/YOLOv6/issues/210
    """
    assert trace.model is not None
    assert trace.training is not None
    model, step, precision = trace.model, trace.training, trace.precision
    regions = misplaced_regions(trace)
    small = bool(regions) and covered(step, regions) < 0.5
    if precision.mixed and small:
        return
    calls = sum(call.count for call in step.forward)
    for region in {(r.device_type, r.dtype, r.site): r for r in regions}.values():
        float32_asked = precision.mode == "true" and precision.explicit
        doubtful = float32_asked or small or region.dtype not in LOW_PRECISION
        yield Evidence(
            f"The autocast region for {region.device_type} in {region.dtype}{place(region.site)} did nothing: "
            f"{_reason(region, model)}. None of the {count(calls, 'module call')} of the training step ran under "
            "autocast.",
            sites=places([region.site]),
            data={
                "region_device_type": region.device_type,
                "model_device_type": model.device_type,
                "dtype": region.dtype,
                "reason": "switched-off" if region.is_for(model.device_type) else "other-device-type",
                "module_calls": calls,
            },
            severity=Severity.WARNING if doubtful and not precision.mixed else None,
        )


def _reason(region: AutocastRegion, model: ModelInfo) -> str:
    if region.is_for(model.device_type):
        return f"torch switched it off, because autocast on {model.device_type} does not support {region.dtype} here"
    off = ", and torch switched it off" if region.requested and not region.enabled else ""
    return f"the model is on {model.device_type}{off}"
