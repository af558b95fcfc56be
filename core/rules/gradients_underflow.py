from collections.abc import Iterator

from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace

_MANY = 0.5


@rule(
    "AMP507",
    Severity.WARNING,
    fix="Scale the loss: `torch.amp.GradScaler(device_type)`, with a larger `init_scale=` if it has one, or use "
    "bfloat16, which has float32's range.",
    needs=("training",),
)
def gradients_underflow(trace: Trace) -> Iterator[Evidence]:
    """Most gradients are too small for float16 at this loss scale.

    What it does
        Takes a sample of the gradients of the watched step, in float16 at its loss scale. Reports if more than half of
        those that are not zero are subnormal, and says which scales would do.

    Why is this bad?
        Below 6e-5 float16 loses precision, and below 6e-8 it is 0: such gradients change nothing.

    Example
        ```python
        scaler = torch.amp.GradScaler(device, init_scale=1.0)
        ```

    Use instead
        ```python
        scaler = torch.amp.GradScaler(device)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
        - https://arxiv.org/abs/1710.03740
    """
    assert trace.training is not None
    gradients = trace.training.gradients
    if gradients is None:
        return
    data = {"zero": gradients.zero / gradients.count, "scale": gradients.scale}
    if gradients.window is None:
        yield Evidence(f"At the loss scale {gradients.scale:g}, all gradients of the watched step are 0.", data=data)
        return
    share = gradients.subnormal / (gradients.count - gradients.zero)
    if share <= _MANY:
        return
    least, largest = gradients.window
    scales = f"; scales from {least:.3g} to {largest:.3g} would do" if least < largest else ""
    yield Evidence(
        f"At the loss scale {gradients.scale:g}, {100 * share:.0f} % of the gradients that are not zero are below "
        f"float16's smallest normal number, and {100 * data['zero']:.0f} % of all are zero{scales}.",
        data={**data, "subnormal": share, "scales": [least, largest]},
    )
