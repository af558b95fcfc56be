from collections.abc import Iterator

from ampcheck.precision import FLOATING
from ampcheck.rules._words import be, count, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ModelInfo, ModuleCall, Trace


@rule(
    "AMP204",
    Severity.WARNING,
    fix="Cast at the source: `torch.from_numpy(array).float()` for data and buffers, `module.float()` for parameters.",
    needs=("model",),
)
def double_precision(trace: Trace) -> Iterator[Evidence]:
    """Parameters, buffers or inputs are float64.

    What it does
        Lists float64 parameters and buffers, and the first module of the watched training step that got a float64
        input. Skips models that are float64 throughout, and runs that asked for float64.

    Why is this bad?
        Autocast does not cast float64, so a layer with a float64 input raises `mat1 and mat2 must have the same
        dtype`. If it does not raise, everything downstream becomes float64, which GPUs compute 2 to 64 times slower
        than float32. NumPy creates float64 by default.

    Example
        ```python
        self.register_buffer("mean", torch.from_numpy(numpy.array([0.48, 0.46, 0.41])))
        ```

    Use instead
        ```python
        self.register_buffer("mean", torch.tensor([0.48, 0.46, 0.41]))
        ```

    References
        - https://pytorch.org/docs/stable/amp.html#autocast-op-reference
        - https://pytorch.org/docs/stable/tensor_attributes.html#torch.dtype
        - https://github.com/xianglin226/scMDC/issues/8
    """
    assert trace.model is not None
    if trace.precision.dtype == "float64" or _is_double(trace.model):
        return
    for kind, tensors in (("parameter", trace.model.parameters), ("buffer", trace.model.buffers)):
        names = [tensor.name for tensor in tensors if tensor.dtype == "float64"]
        if names:
            yield Evidence(
                f"{count(len(names), kind)} of the model {be(len(names))} float64: {some(names)}.",
                module=names[0].rpartition(".")[0] or None if len(names) == 1 else None,
                data={"kind": kind, "tensors": names},
            )
    calls = trace.training.forward if trace.training else ()
    first = next((call for call in calls if "float64" in call.inputs), None)
    if first is not None and not any(tensor.dtype == "float64" for tensor in trace.model.tensors):
        yield Evidence(
            f"A float64 input reached {_name(first)}.",
            module=first.module,
            data={"kind": "input", "module_type": first.type, "inputs": list(first.inputs)},
        )


def _is_double(model: ModelInfo) -> bool:
    return {tensor.dtype for tensor in model.parameters if tensor.dtype in FLOATING} == {"float64"}


def _name(call: ModuleCall) -> str:
    return f"{call.module} ({call.type})" if call.module else f"the module {call.type}"
