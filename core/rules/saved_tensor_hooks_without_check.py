from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP409",
    Severity.WARNING,
    fix="Return a copy from the pack hook, `t.clone()`, or compare `t._version` in the unpack hook.",
    needs=("graph",),
)
def saved_tensor_hooks_without_check(trace: Trace) -> Iterator[Evidence]:
    """Saved-tensor hooks return tensors without a copy, which switches off PyTorch's version check.

    What it does
        Looks for saved tensors that backward got back from saved-tensor hooks in the memory they were saved in.

    Why is this bad?
        PyTorch checks the versions of the tensors that it saves itself, but trusts hooks. Under such hooks an in-place
        write gives wrong gradients instead of an error.

    Example
        ```python
        with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            loss = model(x).sum()
        ```

    Use instead
        ```python
        with saved_tensors_hooks(lambda t: t.to("cpu", copy=True), lambda t: t.to(device)):
            loss = model(x).sum()
        ```

    References
        - https://pytorch.org/docs/stable/autograd.html#torch.autograd.graph.saved_tensors_hooks
    """
    assert trace.graph is not None
    for unchecked in trace.graph.unchecked:
        hooks = f"Saved-tensor hooks{place(unchecked.hooks)}"
        yield Evidence(
            f"{hooks} switch off PyTorch's version check: they return the tensor that {unchecked.node} saved"
            f"{place(unchecked.save)} without a copy.",
            module=unchecked.save.module if unchecked.save else None,
            sites=places((unchecked.save, unchecked.hooks)),
            data={"node": unchecked.node},
        )
