from collections.abc import Iterator

from ampcheck.rules._facts import trainable
from ampcheck.rules._stale import detaching, plain_op
from ampcheck.rules._words import place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import Failure, GraphFreed, NoGraph, Site, Trace


@rule(
    "AMP408",
    Severity.ERROR,
    fix="Call `loss.backward()` once, on a loss that depends on parameters that require grad.",
    needs=("failure",),
)
def graph_freed_or_detached(trace: Trace) -> Iterator[Evidence]:
    """Backward ran through a graph that was already freed, or on a loss without a graph.

    What it does
        For a second backward, names the first. For a loss without a graph, names the last call that cut it:
        `detach`, `no_grad`, an operation without a gradient, or a new tensor made of numbers.

    Why is this bad?
        The first backward frees what the graph had saved, so a second one cannot run. A loss without a graph trains
        nothing.

    Example
        ```python
        state = cell(x, state)
        loss(state).backward()  # in the next iteration: through the old graph again
        ```

    Use instead
        ```python
        state = cell(x, state.detach())
        loss(state).backward()
        ```

    References
        - https://pytorch.org/docs/stable/notes/autograd.html#saved-tensors
    """
    failure = trace.failure
    if failure is not None and isinstance(failure.facts, GraphFreed):
        yield _freed(trace, failure)
    elif failure is not None and isinstance(failure.facts, NoGraph):
        yield _detached(trace, failure)


def _freed(trace: Trace, failure: Failure) -> Evidence:
    raised = failure.sites[0] if failure.sites else None
    earlier = trace.graph.backwards[:-1] if trace.graph is not None else ()
    first = earlier[-1] if earlier else None
    fix, edit = detaching(trace)
    return Evidence(
        f"Backward{place(raised)} reached a part of the graph that an earlier backward{place(first)} had freed.",
        module=failure.module,
        sites=places((raised, first)),
        fix=fix
        or "Add up the losses and call `backward()` once, or `.detach()` what you carry over from the previous step. "
        "Pass `retain_graph=True` to the first backward only if both need the same graph.",
        edit=edit,
    )


def _detached(trace: Trace, failure: Failure) -> Evidence:
    raised = failure.sites[0] if failure.sites else None
    cut = trace.graph.cut[-1] if trace.graph is not None and trace.graph.cut else None
    why = f": {plain_op(cut.op)}{place(cut)} returned a tensor without one" if cut else ""
    return Evidence(
        f"Backward{place(raised)} ran on a loss without a graph{why}.",
        module=failure.module,
        sites=places((raised, cut)),
        fix=_keep_graph(trace, cut),
    )


def _keep_graph(trace: Trace, cut: Site | None) -> str:
    if cut is not None:
        return f"Keep the graph{place(cut)}: no `.detach()`, `.data`, `.item()` or `no_grad` between model and loss."
    recorded = trace.training is not None and any(call.grad_enabled for call in trace.training.calls)
    if recorded and trace.model is not None and trainable(trace.model):
        return (
            "Compute the loss from what the model returned: a tensor made of Python numbers, `torch.tensor(losses)` or "
            "`.item()`, has no graph."
        )
    return "Call `requires_grad_(True)` on the parameters to train, and run the forward pass without `no_grad`."
