from collections.abc import Iterator

from ampcheck.precision import LOW_PRECISION
from ampcheck.rules._facts import trainable
from ampcheck.rules._words import be, count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import OptimizerInfo, TensorInfo, Trace


@rule(
    "AMP309",
    Severity.ERROR,
    fix="Create the optimizer from `model.parameters()` after the model is built, loaded, moved and cast.",
    needs=("model",),
)
def optimizer_holds_other_parameters(trace: Trace) -> Iterator[Evidence]:
    """The optimizer's parameters are not the model's.

    What it does
        Compares, by identity, the parameters in the optimizers with those of the model. It is an error if no optimizer
        holds any of the model's, and a warning if a module was replaced after the optimizer was made: the optimizer
        holds as many parameters of nearly the same shapes instead, or parameters that belong to nothing else. Skips
        optimizers that keep float32 copies of low-precision weights.

    Why is this bad?
        The model never changes. Without a scaler nothing raises; with a scaler the first step fails with `No inf checks
        were recorded for this optimizer.`

    Example
        ```python
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model = copy.deepcopy(model).cuda()
        ```

    Use instead
        ```python
        model = copy.deepcopy(model).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ```

    References
        - https://docs.pytorch.org/docs/stable/optim.html#constructing-it
        - https://github.com/huggingface/accelerate/issues/328
        - https://github.com/pytorch/pytorch/issues/14467
    """
    assert trace.model is not None
    optimizers = [optimizer for optimizer in trace.optimizers if optimizer.parameters]
    parameters = trainable(trace.model)
    if not optimizers or not parameters:
        return
    if any(optimizer.of_model for optimizer in optimizers):
        yield from _replaced(trace, optimizers, parameters)
        return
    master_copies = all(set(optimizer.dtypes) == {"float32"} for optimizer in optimizers)
    if master_copies and all(parameter.dtype in LOW_PRECISION for parameter in parameters):
        return
    held = (f"{optimizer.type} with {count(optimizer.parameters, 'parameter')}" for optimizer in optimizers)
    yield Evidence(
        f"No optimizer holds any of the {count(len(parameters), 'trainable parameter of the model')}: there is "
        f"{some(held)}, none of them the model's.",
        data={
            "trainable": len(parameters),
            "optimizers": {optimizer.type: optimizer.parameters for optimizer in optimizers},
        },
        severity=None if any(optimizer.alike for optimizer in optimizers) else Severity.WARNING,
    )


def _replaced(trace: Trace, optimizers: list[OptimizerInfo], parameters: list[TensorInfo]) -> Iterator[Evidence]:
    """Part of the model was replaced after the optimizer was made, which holds as many parameters of what was there."""
    held = frozenset[str]().union(*(optimizer.names for optimizer in optimizers))
    missing = [parameter for parameter in parameters if parameter.name not in held]
    others = [shape for optimizer in optimizers for shape in optimizer.others]
    called = {call.module for call in trace.training.forward} if trace.training is not None else set()
    used = all(parameter.name.rpartition(".")[0] in called for parameter in missing)
    # Copies in float32 of low-precision weights belong to nothing else either.
    own = all(parameter.dtype not in LOW_PRECISION for parameter in missing)
    gone = own and 0 < len(others) == sum(optimizer.orphans for optimizer in optimizers)
    if not missing or not used or not (gone or _alike([parameter.shape for parameter in missing], others)):
        return
    names = [parameter.name for parameter in missing]
    yield Evidence(
        f"No optimizer holds {some(names)}, which {be(len(names))} trainable. The optimizer holds "
        f"{count(len(others), 'parameter')} instead that {be(len(others))} not the model's.",
        data={"missing": names, "others": len(others)},
        severity=Severity.WARNING,
        fix="Create the optimizer from `model.parameters()` after the last change to the model's modules.",
    )


def _alike(shapes: list[tuple[int, ...]], others: list[tuple[int, ...]]) -> bool:
    """Whether there are as many of each, which differ by one dimension at most: a layer for other classes."""
    ordered = zip(sorted(shapes, key=_order), sorted(others, key=_order), strict=False)
    near = all(len(a) == len(b) and sum(m != n for m, n in zip(a, b, strict=True)) <= 1 for a, b in ordered)
    return len(shapes) == len(others) and near


def _order(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return len(shape), tuple(sorted(shape))
