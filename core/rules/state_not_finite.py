from collections.abc import Iterator

from ampcheck.rules._numbers import data_of, reached, sites_of, told_as, where
from ampcheck.rules._words import some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import StateNotFinite, Trace


@rule(
    "AMP511",
    Severity.ERROR,
    fix="Go back to a checkpoint from before, and train with `numerics='stop'`, which stops at the step that "
    "breaks the weights, while they are intact.",
)
def state_not_finite(trace: Trace) -> Iterator[Evidence]:
    """Parameters, buffers or averaged weights hold NaN or infinities.

    What it does
        Looks at them where training stops anyway: before and after an evaluation, at the end of an epoch, at the end.

    Why is this bad?
        The loss may look healthy: a gradient scaler protects the weights from a bad batch, but not the running
        statistics of batch norm, which evaluation uses, nor an average of the weights.

    Example
        ```python
        model(torch.full((8, 16), float("inf")))  # in training mode: the running mean is infinite from now on
        ```

    Use instead
        ```python
        x = batch[torch.isfinite(batch).all(1)]
        model(x)
        ```

    References
        - https://github.com/pytorch/pytorch/issues/115500
        - https://pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    for found, origin in told_as(trace, "AMP511"):
        given = origin.given
        yield Evidence(
            f"The {given.what if given else 'parameter'} {given.name if given else ''} was not finite before the "
            f"forward pass{where(found)}, so that {reached(found)}: an earlier step broke it.",
            module=origin.module,
            sites=sites_of(origin),
            data=data_of(found, origin),
        )
    if trace.state is not None:
        yield from _seen(trace.state)


def _seen(state: StateNotFinite) -> Iterator[Evidence]:
    kinds = {"parameters": state.parameters, "buffers": state.buffers, "averaged weights": state.averaged}
    said = [f"{what} {some(names)}" for what, names in kinds.items() if names]
    if not said:
        return
    statistics = [name for name in state.buffers if "running_" in name]
    fix = None
    if statistics and not state.parameters:
        fix = (
            "Set them back, `module.reset_running_stats()`, and run some batches in training mode. The batch that "
            "broke them overflowed in forward: compute that in float32."
        )
    yield Evidence(
        f"Not finite {state.moment}: {'; '.join(said)}.",
        data={
            "parameters": list(state.parameters),
            "buffers": list(state.buffers),
            "averaged": list(state.averaged),
            "moment": state.moment,
        },
        fix=fix,
    )
