import math
from collections.abc import Iterator

from ampcheck.rules._words import count
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace

_LIMIT = 65504.0
_LITTLE, _HARDLY = 3.0, 1.0


@rule(
    "AMP506",
    Severity.INFO,
    fix="Compute these modules in float32, `with torch.autocast(device_type, enabled=False):` around the call and "
    "`.float()` on its input, or use bfloat16, whose range is float32's.",
    needs=("training",),
)
def little_headroom(trace: Trace) -> Iterator[Evidence]:
    """A module's output came close to the largest number of float16.

    What it does
        Takes the largest float16 output of each module in the watched training step. Headroom is the number of bits
        between that and 65504. A warning below 1 bit: the next batch may be twice as large.

    Why is this bad?
        Activations grow while a model trains. A module that is near the limit in the first step is where the loss will
        be NaN later.

    Example
        ```python
        x = x * 30000
        ```

    Use instead
        ```python
        x = x * 30
        ```

    References
        - https://pytorch.org/docs/stable/type_info.html#torch-finfo
        - https://arxiv.org/abs/2309.14322
    """
    assert trace.training is not None
    bits = {name: math.log2(_LIMIT / value) for name, value in trace.training.outputs.items() if value > 0}
    near = {name: left for name, left in sorted(bits.items(), key=lambda pair: pair[1]) if left < _LITTLE}
    if not near:
        return
    worst, left = next(iter(near.items()))
    named = ", ".join(f"{name or 'the model'} ({trace.training.outputs[name]:.4g})" for name in list(near)[:3])
    yield Evidence(
        f"In the watched step {count(len(near), 'module')} came within {_LITTLE:g} bits of float16's largest number, "
        f"65504: {named}. The least headroom is {left:.1f} bits.",
        module=worst,
        severity=Severity.WARNING if left < _HARDLY else None,
        data={"headroom_bits": near, "limit": _LIMIT},
    )
