from collections.abc import Iterator

from ampcheck.rules._words import place
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import ExportFailure, Trace

_FIXES = {
    "python-call": "While exporting, compute the same with tensor operations, or register the function with "
    "`torch.library.custom_op`.",
    "autocast-cache": "Export outside the autocast region, or make it `torch.autocast(..., cache_enabled=False)`.",
    "unregistered-tensor": "Register the tensor with the module (`self.register_buffer(...)`, `nn.ParameterList`), or "
    "use `.detach()` on it in `forward`.",
    "data-dependent-branch": "Compute both branches and choose with `torch.where(...)`, or use `torch.cond`.",
    "data-dependent-number": "Keep the number in a tensor instead of reading it with `int()` or `.item()`, or compute "
    "it outside `forward` if it does not depend on the inputs.",
    "left-dispatcher": "Compute it with tensor operations alone, or register the function with "
    "`torch.library.custom_op`.",
    "no-fake-kernel": "Register what the operator returns for tensors without data: `@the_op.register_fake`.",
    "no-onnx-operator": "Compute it with other operations while exporting, or translate the operator "
    "(`custom_translation_table=`, without dynamo `torch.onnx.register_custom_op_symbolic`).",
    "newer-opset": "Pass `opset_version={}` or a later one.",
    "not-in-torchscript": "Rewrite the line in the part of Python that TorchScript compiles, or export with "
    "`torch.export.export`, which runs the model instead of compiling its source.",
    "not-a-tensor": "Export a module around the model whose `forward` returns only tensors (a tuple of them).",
}


@rule(
    "AMP605",
    Severity.ERROR,
    fix="Change the named line, and export again.",
    needs=("export_failure",),
)
def export_failed(trace: Trace) -> Iterator[Evidence]:
    """An export died, and why.

    What it does
        Reads what `torch.jit.trace`, `torch.jit.script`, `torch.export.export`, `torch.onnx.export` or saving their
        result raised, and names the cause and the line of the model: a Python function in the graph, a weight that
        autocast cached, a tensor that no module registers, a branch or a number that depends on the data, an operator
        that has no ONNX form, Python that TorchScript does not compile.

    Why is this bad?
        There is no exported model. If the program handles the exception and goes on, the finding is a warning.

    Example
        ```python
        class Gate(nn.Module):
            def forward(self, x):
                return x if x.mean() > 0 else -x


        exported = torch.export.export(Gate(), (example,))
        ```

    Use instead
        ```python
        class Gate(nn.Module):
            def forward(self, x):
                return torch.where(x.mean() > 0, x, -x)


        exported = torch.export.export(Gate(), (example,))
        ```

    References
        - https://pytorch.org/docs/stable/export.html
        - https://pytorch.org/docs/stable/jit_language_reference.html
        - https://pytorch.org/docs/stable/onnx.html
    """
    failure = trace.export_failure
    assert failure is not None
    if failure.fault is None:
        return
    yield Evidence(
        f"{_said(failure)} `{failure.function}` stopped there: {failure.message.rstrip('.')}.",
        sites=failure.sites,
        data={"reason": failure.fault, "detail": failure.detail, "handled": failure.handled},
        severity=Severity.WARNING if failure.handled else None,
        fix=_FIXES[failure.fault].format(failure.detail),
    )


def _said(failure: ExportFailure) -> str:
    at = place(failure.sites[0]) if failure.sites else ""
    about = failure.detail
    match failure.fault:
        case "python-call":
            function = f" (`{about}`)" if about else ""
            return f"The model calls a custom autograd function{function}{at}, and Python code cannot be exported."
        case "autocast-cache":
            return f"Under autocast, the low-precision copy of a weight{at} comes from autocast's cache, unseen."
        case "unregistered-tensor":
            return f"A tensor that requires grad is used{at}, and no module holds it as a parameter or a buffer."
        case "data-dependent-branch":
            return f"Which branch is taken depends on the values of a tensor{at}."
        case "data-dependent-number":
            return f"A Python number is read from a tensor{at} that depends on the inputs."
        case "left-dispatcher":
            return f"Code outside PyTorch's operations reads a tensor{at}."
        case "no-fake-kernel":
            return f"The operator {about} does not say{at} what it returns for tensors without data."
        case "newer-opset":
            return f"The chosen ONNX opset lacks an operator that version {about} has{at}."
        case "no-onnx-operator":
            return f"The operator {about} has no ONNX form{at}."
        case "not-a-tensor":
            return f"The model returns something other than tensors{at}."
    return f"TorchScript does not compile a line of the model{at}."
