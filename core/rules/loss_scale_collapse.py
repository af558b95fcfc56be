from collections.abc import Iterator

from ampcheck.rules._words import places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace

_ENOUGH = 3


@rule(
    "AMP307",
    Severity.WARNING,
    fix="Find what overflows in the forward pass (a loss in float16, a division by a small number) and compute it in "
    "float32: `with torch.autocast(device_type, enabled=False): loss = criterion(output.float(), target)`.",
    needs=("training",),
)
def loss_scale_collapse(trace: Trace) -> Iterator[Evidence]:
    """The scaler skipped every watched step: its scale falls, and the model does not train.

    What it does
        Counts the optimizer steps that the scaler skipped. Reports only if three or more steps were watched
        (`watch_steps=`), all of them were skipped, and no loss was finite or the scale fell below 1: a fresh scaler
        skips a few steps while it searches its scale.

    Why is this bad?
        A scaler halves its scale at each overflow. If the loss itself is not finite, no scale helps: it falls towards
        zero, every step is skipped, and the run goes on without learning anything and without saying so.

    Example
        ```python
        loss = (output / (output - output)).mean()  # never finite
        ```

    Use instead
        ```python
        loss = (output / (output.std() + 1e-6)).mean()
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#gradient-scaling
    """
    assert trace.training is not None
    steps = [call for call in trace.training.scaling if call.op == "step" and call.skipped is not None]
    collapse = trace.training.collapse
    # While losses are finite, a fresh scaler may still search for its scale.
    fallen = collapse is None or collapse.scale < 1 or not collapse.finite
    if len(steps) >= _ENOUGH and all(call.skipped for call in steps) and fallen:
        yield Evidence(
            f"The scaler skipped all {len(steps)} watched optimizer steps, and lowered its scale each time.",
            sites=places([steps[0].site]),
            data={"steps": len(steps), "skipped": len(steps)},
        )
