from collections.abc import Iterator

from ampcheck.rules._stale import as_write, statement
from ampcheck.rules._words import place
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import LeafModified, Trace


@rule(
    "AMP403",
    Severity.ERROR,
    fix="Update parameters inside `with torch.no_grad():`; for an input, use the out-of-place operation.",
    needs=("failure",),
)
def leaf_modified_in_place(trace: Trace) -> Iterator[Evidence]:
    """A leaf tensor that requires grad was modified in place.

    What it does
        Names the line that writes to a parameter, or to an input that requires grad, while autograd records.

    Why is this bad?
        Gradients accumulate in leaves, and a leaf cannot also be the result of an operation. PyTorch refuses the write.

    Example
        ```python
        for p in model.parameters():
            p -= lr * p.grad
        ```

    Use instead
        ```python
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        ```

    References
        - https://pytorch.org/docs/stable/notes/autograd.html#in-place-operations-with-autograd
        - https://github.com/pytorch/examples/pull/779
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, LeafModified):
        return
    site = as_write(failure.sites[0]) if failure.sites else None
    line = f" by `{statement(site)}`{place(site)}" if site and site.code else ""
    yield Evidence(
        f"A leaf tensor that requires grad was modified in place{line}.",
        module=failure.module,
        sites=(site,) if site else (),
    )
