from collections.abc import Iterator

from ampcheck.precision import FLOATING
from ampcheck.rules._words import count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP202",
    Severity.WARNING,
    fix="Give all parameters of a module one dtype: call `module.to(dtype)` on the whole module.",
    needs=("model",),
)
def mixed_dtypes_in_module(trace: Trace) -> Iterator[Evidence]:
    """The parameters of one module, such as its weight and its bias, differ in dtype.

    What it does
        Lists the modules whose own parameters have more than one of float16, bfloat16, float32 and float64. Skips
        quantized weights with floating-point scales, and buffers.

    Why is this bad?
        Autocast hides it: it casts weight and bias alike. With autocast off, in evaluation or in a region with
        `enabled=False`, the same layer raises `Input type (c10::Half) and bias type (float) should be the same`.

    Example
        ```python
        conv.weight.data = conv.weight.data.half()
        ```

    Use instead
        ```python
        conv.half()
        ```

    References
        - https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.to
        - https://github.com/mk-minchul/AdaFace/issues/127
    """
    assert trace.model is not None
    mixed = {m.name: m.type for m in trace.model.modules if len(m.parameters.keys() & FLOATING) > 1}
    if not mixed:
        return
    dtypes: dict[str, dict[str, str]] = {name: {} for name in mixed}
    for parameter in trace.model.parameters:
        owner, _, own = parameter.name.rpartition(".")
        if owner in mixed and parameter.dtype in FLOATING:
            dtypes[owner][own] = parameter.dtype
    spelled = (
        f"{name or mixed[name]} ({some(f'{own} {dtype}' for own, dtype in own_dtypes.items())})"
        for name, own_dtypes in dtypes.items()
    )
    yield Evidence(
        f"The parameters differ in dtype inside {count(len(mixed), 'module')}: {some(spelled)}.",
        module=next(iter(mixed)) if len(mixed) == 1 else None,
        data={"modules": dtypes},
    )
