from collections.abc import Iterator
from dataclasses import replace

from ampcheck.rules._stale import as_write, out_of_place
from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Failure, Site, Trace

_MADE_BY = {"split": "split", "splitwithsizes": "split", "chunk": "split", "unbind": "unbind"}


@rule(
    "AMP404",
    Severity.ERROR,
    fix="Write out of place, or to a copy of the view: `x = x.clone()`.",
    needs=("failure",),
)
def view_modified_in_place(trace: Trace) -> Iterator[Evidence]:
    """A view that autograd cannot follow a write through was written to in place.

    What it does
        Names the line that writes, and the call that made the view: a view of a leaf, one of the several views that
        `split`, `chunk` or `unbind` return at once, or one made under `no_grad` or in a custom function.

    Why is this bad?
        A write to a view is a write to its base. Where autograd cannot give the base a new history, PyTorch refuses.

    Example
        ```python
        gate, value = x.chunk(2, dim=1)
        gate *= value
        ```

    Use instead
        ```python
        gate, value = x.chunk(2, dim=1)
        gate = gate * value
        ```

    References
        - https://pytorch.org/docs/stable/tensor_view.html
        - https://github.com/pytorch/pytorch/pull/58285
    """
    failure = trace.failure
    if failure is not None and failure.kind == "viewed-base-modified":
        yield _base_modified(trace, failure)
    if failure is None or failure.kind not in _SAID:
        return
    write = as_write(failure.sites[0]) if failure.sites else None
    view = _origin(trace, failure)
    fields = failure.fields
    yield Evidence(
        f"{_SAID[failure.kind].format(node=fields.get('node', 'a function'), mode=fields.get('mode', 'no_grad'))}"
        f" was written to in place{place(write)}{f'; the view was made{place(view)}' if view else ''}.",
        module=failure.module,
        sites=places((write, view)),
        data={name: fields[name] for name in ("node", "output", "mode") if name in fields},
        fix=_fix(failure, write),
    )


_SAID = {
    "leaf-view-modified": "A view of a leaf that requires grad",
    "multi-view-modified": "An output of {node}, which returns several views at once,",
    "custom-function-view": "A view that the custom function {node} returned",
    "view-modified-no-grad": "A view made under {mode}",
}


def _base_modified(trace: Trace, failure: Failure) -> Evidence:
    """The write came first, and to the base or another view: PyTorch refuses the view when it is used next."""
    written = trace.graph.written_views if trace.graph is not None else ()
    kind = _kind(failure)
    candidates = [(view, writes) for view, writes in written if kind and kind in (view.op or "")]
    view, writes = candidates[0] if len(candidates) == 1 else (None, ())
    fields = failure.fields
    node = fields.get("node")
    subject = f"An output of {node}, which is a view," if node else f"A view made under {fields.get('mode', 'no_grad')}"
    use = replace(failure.sites[0], role="call") if failure.sites else None
    base = "the tensor that it is a view of, or another view of that,"
    return Evidence(
        f"{subject} was used{place(use)} after {base} had been written to in place"
        f"{place(writes[-1]) if writes else ''}{f'; the view was made{place(view)}' if view else ''}.",
        module=failure.module,
        sites=places((*writes[-3:], view, use)),
        data={name: fields[name] for name in ("node", "output", "mode") if name in fields},
        fix=out_of_place(writes[-1], "") if writes else None,
    )


def _origin(trace: Trace, failure: Failure) -> Site | None:
    """The call that made the view: the last of its kind."""
    if failure.kind != "multi-view-modified" or trace.graph is None:
        return None
    kind = _kind(failure)
    return next((view for view in reversed(trace.graph.views) if kind and kind in (view.op or "")), None)


def _kind(failure: Failure) -> str | None:
    """The op that returned several views, by the node that the message names."""
    node = str(failure.fields.get("node", "")).lower()
    return next((op for name, op in _MADE_BY.items() if node.startswith(name)), None)


def _fix(failure: Failure, write: Site | None) -> str | None:
    if failure.kind == "leaf-view-modified":
        return "Do the write inside `with torch.no_grad():`, or on a copy: `.clone()`."
    return out_of_place(write, "") if write else None
