"""Hand-built traces: a healthy mixed-precision run on a GPU, and the pieces to break it with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ampcheck.precision import Precision
from ampcheck.rules import RULES
from ampcheck.rules.rule import Finding, Severity
from ampcheck.trace import (
    AutocastRegion,
    AutocastState,
    ModelInfo,
    ModuleCall,
    ModuleInfo,
    OpCall,
    Operand,
    OptimizerInfo,
    ScalerInfo,
    Site,
    StepTrace,
    TensorInfo,
    Trace,
)

ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
FP16 = Precision("mixed", "cuda", "float16", True, "--amp")
BF16 = Precision("mixed", "cuda", "bfloat16", False, "--amp --amp-dtype bfloat16")
SCALER = ScalerInfo("GradScaler", True, "cuda")
NET = {"stem.weight": "float32", "stem.bias": "float32", "head.weight": "float32"}


def site(line: int = 12, file: str = "/work/train.py") -> Site:
    return Site(file, line, "main", "with torch.autocast(device):")


def region(
    device_type: str = "cuda",
    dtype: str = "float16",
    *,
    index: int = 0,
    enabled: bool = True,
    requested: bool | None = True,
    line: int = 12,
    **more: Any,
) -> AutocastRegion:
    return AutocastRegion(index, device_type, dtype, enabled, requested, True, site(line), **more)


def state(dtype: str | None, device_type: str = "cuda", *, cache: bool = True) -> AutocastState:
    """Autocast in ``dtype``, or off for ``None``."""
    return AutocastState(device_type, dtype is not None, dtype or "float16", cache)


def call(
    module: str | None,
    dtype: str | None = "float16",
    region: int | None = 0,
    *,
    device_type: str = "cuda",
    cache: bool = True,
    grad: bool = True,
    backward: bool = False,
    inputs: tuple[str, ...] = ("float32",),
    kind: str = "Linear",
    **more: Any,
) -> ModuleCall:
    autocast = state(dtype, device_type, cache=cache)
    return ModuleCall(module, kind, autocast, region, grad, backward, inputs, (dtype or "float32",), **more)


def op(name: str, *operands: Operand, dtype: str | None = "float16", line: int = 20, **more: Any) -> OpCall:
    outputs = ("float32",) if operands else ()
    more = {"module": "head", "device_type": "cuda", "count": 1} | more
    autocast = state(dtype, more.pop("device_type"))
    return OpCall(name, more["module"], autocast, operands, outputs, site(line), more["count"])


def model(
    tensors: dict[str, str] = NET,
    *,
    device_type: str = "cuda",
    buffers: dict[str, str] | None = None,
    frozen: tuple[str, ...] = (),
    compiled: bool = False,
) -> ModelInfo:
    """A model of parameters and buffers given by qualified name and dtype."""
    owners: dict[str, Counter[str]] = {"": Counter()}
    for name, dtype in tensors.items():
        owners.setdefault(name.rpartition(".")[0], Counter())[dtype] += 1
    return ModelInfo(
        "Net",
        device_type,
        tuple(ModuleInfo(name, "Linear" if name else "Net", counts) for name, counts in owners.items()),
        (
            *(
                TensorInfo(name, dtype, (4, 4) if "weight" in name else (4,), device_type, name not in frozen)
                for name, dtype in tensors.items()
            ),
            *(TensorInfo(name, dtype, (4,), device_type, buffer=True) for name, dtype in (buffers or {}).items()),
        ),
        compiled,
    )


def calls(dtype: str | None, region: int | None = 0, **more: Any) -> tuple[ModuleCall, ...]:
    """One forward pass: stem, head, and the model around them."""
    return tuple(
        call(name, dtype, region, kind=kind, leaf=bool(name), **more)
        for name, kind in (("stem", "Conv2d"), ("head", "Linear"), ("", "Net"))
    )


def step(dtype: str | None = "float16", *regions: AutocastRegion, **more: Any) -> StepTrace:
    """A watched step that ran under ``dtype``, by default in one region of that dtype."""
    if dtype is not None and not regions:
        regions = (region(dtype=dtype),)
    return StepTrace(**({"calls": calls(dtype, 0 if regions else None), "regions": regions} | more))


def trace(**facts: Any) -> Trace:
    """A healthy run in mixed float16 with loss scaling, but for ``facts``."""
    healthy: dict[str, Any] = {
        "precision": FP16,
        "model": model(),
        "optimizers": (OptimizerInfo("SGD", 3, 3, {"float32": 3}),),
        "scaler": SCALER,
        "training": step(),
        "evaluation": step(),
    }
    return Trace(**(healthy | facts))


def findings(trace: Trace) -> list[Finding]:
    """What all rules that can be judged find."""
    return [finding for rule in RULES if rule.missing(trace) is None for finding in rule(trace)]


def found(trace: Trace) -> dict[str, Severity]:
    """The same by code. Each code must be found once."""
    seen = findings(trace)
    by_code = {finding.code: finding.severity for finding in seen}
    assert len(by_code) == len(seen), seen
    return by_code


def only(trace: Trace) -> Finding:
    """The one finding there is."""
    (finding,) = findings(trace)
    return finding
