from collections.abc import Iterator

from ampcheck.rules._facts import in_force
from ampcheck.rules._words import count, places, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP104",
    Severity.ERROR,
    fix="Pass the dtype to the region: `torch.autocast(device_type, dtype=...)`. The default is float16 on CUDA and "
    "bfloat16 on the CPU.",
    needs=("training",),
)
def autocast_dtype_differs(trace: Trace) -> Iterator[Evidence]:
    """The autocast dtype in force is not the one asked for.

    What it does
        Compares the declared dtype of mixed precision with the autocast dtype in force at each module call of the
        watched training step. It is a warning if other modules did run in the dtype asked for, and information if the
        framework is known to use this dtype instead.

    Why is this bad?
        float16 and bfloat16 fail in different ways. float16 needs loss scaling and overflows above 65504; bfloat16
        keeps the range of float32 with 8 bits of precision. Settings chosen for one are wrong for the other.

    Example
        ```python
        config.dtype = "float16"
        with torch.autocast("cpu"):  # bfloat16
            loss = criterion(model(images), labels)
        ```

    Use instead
        ```python
        with torch.autocast("cpu", dtype=getattr(torch, config.dtype)):
            loss = criterion(model(images), labels)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#torch.autocast
        - https://github.com/datawhalechina/happy-llm/pull/215
    """
    assert trace.training is not None
    precision, step = trace.precision, trace.training
    asked, dtypes = precision.dtype, in_force(step)
    if not precision.mixed or asked is None:
        return
    right = dtypes.pop(asked, 0)
    for dtype, calls in dtypes.items():
        if right and dtype == "float32":
            continue
        under = [call for call in step.forward if call.autocast.enabled and call.autocast.dtype == dtype]
        regions = [next(step.around(call.region), None) for call in under]
        documented = dtype == precision.effective_dtype
        why = f", which {trace.host.name if trace.host else 'the framework'} uses instead" if documented else ""
        source = f" by {precision.source}" if precision.source else ""
        yield Evidence(
            f"{asked} was asked for{source}, but {count(calls, 'module call')} of the training step ran under autocast "
            f"{dtype}{why}: {some(dict.fromkeys(call.module or call.type for call in under))}.",
            sites=places(region.site for region in regions if region),
            data={"asked": asked, "in_force": dtype, "module_calls": calls, "module_calls_as_asked": right},
            severity=Severity.INFO if documented else Severity.WARNING if right else None,
        )
