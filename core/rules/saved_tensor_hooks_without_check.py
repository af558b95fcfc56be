from collections.abc import Iterator

from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Trace


@rule(
    "AMP409",
    Severity.WARNING,
    fix="Let the pack hook return a copy or a handle, or compare `tensor._version` in the unpack hook.",
    needs=("graph",),
)
def saved_tensor_hooks_without_check(trace: Trace) -> Iterator[Evidence]:
    """Saved-tensor hooks hand tensors back as they were, which switches PyTorch's version check off.

    What it does
        Looks for saved tensors that backward got back from a pack hook with the memory they were saved with.

    Why is this bad?
        PyTorch checks the version of what it saved itself, and trusts hooks. Under such hooks a write in place
        gives wrong gradients where it would have raised.

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
            f"{hooks} switch PyTorch's version check off: what {unchecked.node} saved{place(unchecked.save)} comes "
            "back as it was.",
            module=unchecked.save.module if unchecked.save else None,
            sites=places((unchecked.save, unchecked.hooks)),
            data={"node": unchecked.node},
        )
