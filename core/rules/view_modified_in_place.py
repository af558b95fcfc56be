from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ampcheck.rules._stale import Remedy, as_write, without_write
from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import (
    CustomFunctionViewModified,
    Failure,
    InternalOverlap,
    LeafViewModified,
    MultiViewModified,
    NoGradViewModified,
    Site,
    Trace,
    ViewedBaseModified,
    ViewFailure,
)

_MADE_BY = {"split": "split", "splitwithsizes": "split", "chunk": "split", "unbind": "unbind"}


@rule(
    "AMP404",
    Severity.ERROR,
    fix="Use the out-of-place operation, or write to a copy of the view: `x = x.clone()`.",
    needs=("failure",),
)
def view_modified_in_place(trace: Trace) -> Iterator[Evidence]:
    """A view was modified in place, and autograd cannot track the write through it.

    What it does
        Names the line that writes, and the call that made the view: a view of a leaf, one of the several views that
        `split`, `chunk` or `unbind` return at once, a view made under `no_grad` or in a custom function, or one that
        `expand` made, in which elements share memory.

    Why is this bad?
        A write to a view is a write to its base. If autograd cannot give the base a new history, PyTorch refuses the
        write.

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
    if failure is None:
        return
    facts = failure.facts
    if isinstance(facts, ViewedBaseModified):
        yield _base_modified(trace, failure, facts)
    elif isinstance(facts, InternalOverlap):
        yield _overlapping(trace, failure, facts)
    elif isinstance(facts, (LeafViewModified, MultiViewModified, CustomFunctionViewModified, NoGradViewModified)):
        write = as_write(failure.sites[0]) if failure.sites else None
        view = _origin(trace, facts) if isinstance(facts, MultiViewModified) else None
        made = f"; the view was made{place(view)}" if view else ""
        fix, edit = without_write(trace, write) if write else Remedy()
        if isinstance(facts, LeafViewModified):
            fix, edit = "Write inside `with torch.no_grad():`, or to a copy of the leaf: `.clone()`.", None
        yield Evidence(
            f"{_subject(facts)} was modified in place{place(write)}{made}.",
            module=failure.module,
            sites=places((write, view)),
            data=_data(facts),
            fix=fix,
            edit=edit,
        )


def _subject(facts: ViewFailure) -> str:
    node = facts.node or "a function"
    if isinstance(facts, LeafViewModified):
        return "A view of a leaf that requires grad"
    if isinstance(facts, MultiViewModified):
        return f"An output of {node}, which returns several views at once,"
    if isinstance(facts, CustomFunctionViewModified):
        return f"A view that the custom function {node} returned"
    return f"A view made under {facts.mode or 'no_grad'}"


def _base_modified(trace: Trace, failure: Failure, facts: ViewedBaseModified) -> Evidence:
    """The write to the base or to another view came first: PyTorch refuses the view at its next use."""
    written = trace.graph.written_views if trace.graph is not None else ()
    op = _made_by(facts)
    candidates = [(view, writes) for view, writes in written if op and op in (view.op or "")]
    view, writes = candidates[0] if len(candidates) == 1 else (None, ())
    subject = f"An output of {facts.node}, which is a view," if facts.node else _subject(facts)
    use = replace(failure.sites[0], role="call") if failure.sites else None
    fix, edit = without_write(trace, writes[-1]) if writes else Remedy()
    base = "its base, or another view of that base,"
    return Evidence(
        f"{subject} was used{place(use)} after {base} had been modified in place"
        f"{place(writes[-1]) if writes else ''}{f'; the view was made{place(view)}' if view else ''}.",
        module=failure.module,
        sites=places((*writes[-3:], view, use)),
        data=_data(facts),
        fix=fix,
        edit=edit,
    )


def _overlapping(trace: Trace, failure: Failure, facts: InternalOverlap) -> Evidence:
    write = as_write(failure.sites[0]) if failure.sites else None
    if facts.with_input:
        message = f"The write{place(write)} reads memory that it also writes to, through another view."
        fix, edit = Remedy(
            f"Read from a copy{place(write)}: `.clone()` the operand that shares memory with the target."
        )
    else:
        message = (
            f"A view in which several elements are the same memory, such as `expand` makes, was modified in place"
            f"{place(write)}."
        )
        fix, edit = without_write(trace, write) if write else Remedy()
    return Evidence(message, module=failure.module, sites=places((write,)), fix=fix, edit=edit)


def _data(facts: ViewFailure) -> dict[str, Any]:
    known = {"node": facts.node, "output": facts.output, "mode": facts.mode}
    return {name: value for name, value in known.items() if value is not None}


def _origin(trace: Trace, facts: ViewFailure) -> Site | None:
    """The call that made the view: the last of its kind."""
    op = _made_by(facts)
    views = trace.graph.views if trace.graph is not None else ()
    return next((view for view in reversed(views) if op and op in (view.op or "")), None)


def _made_by(facts: ViewFailure) -> str | None:
    """The op that returned several views, by the node that the message names."""
    node = (facts.node or "").lower()
    return next((op for name, op in _MADE_BY.items() if node.startswith(name)), None)
