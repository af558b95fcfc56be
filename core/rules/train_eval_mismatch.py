from collections import Counter
from collections.abc import Iterator

from ampcheck.precision import FLOATING
from ampcheck.rules._words import count, share, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ModelInfo, StepTrace, Trace


@rule(
    "AMP105",
    Severity.WARNING,
    fix="Run training and evaluation under the same `torch.autocast(...)`, and evaluate the model, or a copy of it, in "
    "the dtype of its parameters.",
    needs=("training", "evaluation"),
)
def train_eval_mismatch(trace: Trace) -> Iterator[Evidence]:
    """Training and evaluation ran under different autocast, or the evaluated copy has other dtypes.

    What it does
        Compares, module by module, autocast in the first training step with autocast in the first evaluation step, and
        the dtypes of the parameters and buffers of an evaluated copy with those of the model. It is information if the
        framework evaluates this way by default.

    Why is this bad?
        The metrics belong to a slightly different network: an overflow in float16 shows in only one of the two, and a
        module whose inputs autocast used to cast fails in the first evaluation with a dtype error.

    Example
        ```python
        with torch.autocast(device, dtype=torch.float16):
            loss = criterion(model(images), labels)
        ...
        model.eval()
        with torch.no_grad():
            predictions = model(images)
        ```

    Use instead
        ```python
        model.eval()
        with torch.no_grad(), torch.autocast(device, dtype=torch.float16):
            predictions = model(images)
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocasting
        - https://github.com/hiyouga/ChatGLM-Efficient-Tuning/issues/261
    """
    assert trace.training is not None
    assert trace.evaluation is not None
    default = trace.precision.evaluation_dtype
    yield from _autocast(trace.training, trace.evaluation, default)
    if trace.model is not None and trace.evaluation.model is not None:
        yield from _copy(trace.model, trace.evaluation.model, default)


def _autocast(training: StepTrace, evaluation: StepTrace, default: str | None) -> Iterator[Evidence]:
    trained, evaluated = _states(training), _states(evaluation)
    shared = trained.keys() & evaluated.keys()
    differing: dict[tuple[str, str], list[str]] = {}
    for module in trained:
        if module in shared and trained[module] != evaluated[module]:
            differing.setdefault((trained[module], evaluated[module]), []).append(module)
    for (train, test), modules in differing.items():
        documented = test == default
        yield Evidence(
            f"{len(modules)} of the {count(len(shared), 'module')} that ran in both ran under {_words(train)} in "
            f"training and under {_words(test)} in evaluation: {some(name or 'the model itself' for name in modules)}"
            f"{', which is the default here' if documented else ''}.",
            data={"training": train, "evaluation": test, "modules": modules},
            severity=Severity.INFO if documented else None,
            situation="only-evaluation" if train == "float32" else "only-training" if test == "float32" else "dtype",
        )


def _states(step: StepTrace) -> dict[str, str]:
    """The dtype each module mostly ran under; float32 stands for autocast off."""
    seen: dict[str, Counter[str]] = {}
    for call in step.forward:
        if call.module is not None:
            state = call.autocast.dtype if call.autocast.enabled else "float32"
            seen.setdefault(call.module, Counter())[state] += call.count
    return {module: states.most_common(1)[0][0] for module, states in seen.items()}


def _words(dtype: str) -> str:
    return "no autocast" if dtype == "float32" else f"autocast {dtype}"


def _copy(model: ModelInfo, copy: ModelInfo, default: str | None) -> Iterator[Evidence]:
    own = {tensor.name: tensor.dtype for tensor in model.tensors if tensor.dtype in FLOATING}
    differing: dict[tuple[str, str], list[str]] = {}
    for tensor in copy.tensors:
        if tensor.dtype in FLOATING and own.get(tensor.name, tensor.dtype) != tensor.dtype:
            differing.setdefault((own[tensor.name], tensor.dtype), []).append(tensor.name)
    for (train, test), names in differing.items():
        documented = test == default
        yield Evidence(
            f"{share(len(names), len(own), 'floating tensor of the model')} {train} in training and {test} in the "
            f"evaluated copy: {some(names)}{', which is the default here' if documented else ''}.",
            data={"training": train, "evaluation": test, "tensors": names},
            severity=Severity.INFO if documented else None,
            situation="copy",
        )
