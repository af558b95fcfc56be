from collections.abc import Iterator

from ampcheck.rules._words import some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace, Updates

# Of a parameter, nearly all; of the whole model, most.
_NEARLY_ALL, _MOST = 0.9, 0.5


@rule(
    "AMP508",
    Severity.WARNING,
    fix="Keep the weights in float32, and run the forward pass under `torch.autocast(device_type, "
    "dtype=torch.bfloat16)`: create the model in float32, or call `model.float()` before you create the optimizer.",
    needs=("training",),
)
def updates_lost(trace: Trace) -> Iterator[Evidence]:
    """The optimizer's updates are too small for the dtype of the weights, and are rounded away.

    What it does
        Compares float16 and bfloat16 parameters before and after the optimizer's step of the watched step, in a sample
        of their elements, where PyTorch's own optimizers train them. Elements without a gradient do not count, nor do
        those that a learning rate still warming up will move. An error if nearly all of what trains cannot move.

    Why is this bad?
        bfloat16 has 8 bits: 1.0 plus 0.001 is 1.0. Under AdamW with a learning rate of 1e-3 a normalization weight of
        1.0 never moves. Nothing says so; the loss only falls less than it could.

    Example
        ```python
        model = Net().bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        ```

    Use instead
        ```python
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = criterion(model(x), y)
        ```

    References
        - https://arxiv.org/abs/2010.06192
        - https://pytorch.org/docs/stable/type_info.html#torch-finfo
    """
    assert trace.training is not None
    trained = [one for one in trace.training.updates if one.with_gradient]
    lost = [one for one in trained if _lost(one) / one.with_gradient > _NEARLY_ALL]
    everything = sum(one.with_gradient for one in trained)
    unmoved = sum(_lost(one) for one in trained)
    # Without a bound, a parameter's next update may be large enough.
    if not lost or not (any(one.bounded for one in lost) or unmoved / everything > _MOST):
        return
    worst = sorted(lost, key=lambda one: -_lost(one) / one.with_gradient)
    rates = sorted({one.largest_lr for one in lost})
    at = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    error = all(one.bounded for one in lost) and unmoved / everything > _NEARLY_ALL
    dtype = lost[0].dtype
    yield Evidence(
        f"The optimizer's step left {100 * unmoved / everything:.0f} % of the sampled {dtype} weights that have a "
        f"gradient as they were: at a learning rate of {at} the update is less than half the distance to the next "
        f"{dtype} number. Most elements do not move in {some(one.parameter for one in worst)}.",
        module=worst[0].module or None if len({one.module for one in lost}) == 1 else None,
        severity=Severity.ERROR if error else None,
        told_by="AMP201",
        data={
            "dtype": dtype,
            "unmoved": unmoved,
            "with_gradient": everything,
            "parameters": {one.parameter: [_lost(one), one.with_gradient] for one in worst},
            "lr": rates,
        },
    )


def _lost(one: Updates) -> int:
    return one.unmoved - one.would_move
