from collections.abc import Iterator

from ampcheck.rules._stale import (
    cause,
    data_of,
    found_by_pytorch,
    module_of,
    others_in_words,
    remedy,
    sites_of,
    what,
)
from ampcheck.rules._words import sentence
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Failure, SavedTensorModified, Trace


@rule(
    "AMP401",
    Severity.ERROR,
    fix="Use the out-of-place operation, or write to a copy: `x = x.clone()` before the write.",
    needs=("failure",),
)
def saved_tensor_modified(trace: Trace) -> Iterator[Evidence]:
    """A tensor that autograd had saved for backward was modified in place before backward used it.

    What it does
        Finds the line that wrote in the log of writes of the failing step, and the line and the node that saved in the
        graph on which backward failed. Lists all other saved tensors that are stale too.

    Why is this bad?
        The gradient needs the old value, which is gone, so backward raises. PyTorch names the operation whose gradient
        failed; the write is somewhere else, often in another module or another file.

    Example
        ```python
        x = F.relu(self.norm(x))
        x = F.dropout(x, self.p, inplace=True, training=self.training)
        ```

    Use instead
        ```python
        x = F.relu(self.norm(x))
        x = F.dropout(x, self.p, training=self.training)
        ```

    References
        - https://pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
        - https://github.com/huggingface/pytorch-image-models/issues/2355
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, SavedTensorModified):
        return
    stale = found_by_pytorch(trace)
    if not stale:
        yield _from_message(trace, failure, failure.facts)
        return
    first, *others = stale
    if cause(first) != "write":
        return
    message = f"{what(first)} was modified in place before backward could use it."
    if not first.writes:
        message += _unseen(trace)
    write = first.writes[0] if first.writes else None
    fix, edit = remedy(trace, first)
    yield Evidence(
        sentence(message) + others_in_words(others),
        module=module_of(first),
        sites=sites_of(first) or failure.sites[:1],
        data={**data_of(first, others), **({"op": write.op} if write else {})},
        fix=fix,
        edit=edit,
    )


def _from_message(trace: Trace, failure: Failure, facts: SavedTensorModified) -> Evidence:
    """What the exception alone tells."""
    tensor = f"The output of {facts.node}" if facts.node else "A saved tensor"
    shape = list(facts.shape) if facts.shape is not None else None
    data = {"node": facts.node, "dtype": facts.dtype, "shape": shape}
    return Evidence(
        f"{tensor} was modified in place before backward could use it.{_unseen(trace)}",
        module=failure.module,
        sites=failure.sites[:1],
        data={name: value for name, value in data.items() if value is not None},
    )


def _unseen(trace: Trace) -> str:
    replay = trace.graph.replay if trace.graph is not None and trace.graph.replay else trace.unobserved.get("graph")
    return f" AmpCheck did not see which line wrote{f': {replay}' if replay else ''}."
