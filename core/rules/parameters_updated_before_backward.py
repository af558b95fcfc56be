from collections.abc import Iterator

from ampcheck.rules._stale import cause, data_of, detaching, found_by_pytorch, passed_by_pytorch, sites_of
from ampcheck.rules._words import place, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import StaleTensor, Trace


@rule(
    "AMP405",
    Severity.ERROR,
    fix="Run every backward pass before the optimizer step, or run the forward pass again after it.",
    needs=("graph",),
)
def parameters_updated_before_backward(trace: Trace) -> Iterator[Evidence]:
    """An optimizer stepped between a forward pass and its backward.

    What it does
        Names the step that changed parameters, and the operation that had saved them for a later backward.

    Why is this bad?
        Backward would combine the new parameters with the old activations. PyTorch raises; after an optimizer that
        writes through `.data`, backward is silently wrong.

    Example
        ```python
        fake = discriminator(generator(noise))
        loss_d.backward()
        optimizer_d.step()
        loss_g(fake).backward()
        ```

    Use instead
        ```python
        loss_d.backward()
        optimizer_d.step()
        fake = discriminator(generator(noise))
        loss_g(fake).backward()
        ```

    References
        - https://github.com/pytorch/pytorch/issues/39141
    """
    crashed = found_by_pytorch(trace)
    if crashed and cause(crashed[0]) == "optimizer":
        yield _evidence(trace, crashed, silent=False)
    silent = tuple(stale for stale in passed_by_pytorch(trace) if cause(stale) == "optimizer")
    if silent:
        yield _evidence(trace, silent, silent=True)


def _evidence(trace: Trace, stale: tuple[StaleTensor, ...], *, silent: bool) -> Evidence:
    first, *others = stale
    write = next((write for write in first.writes if write.by == "optimizer"), None)
    names = list(dict.fromkeys(one.name for one in stale if one.name and cause(one) == "optimizer"))
    changed = some(names) if names else "parameters"
    passed = " The step bypasses the version counter, so PyTorch says nothing." if silent else ""
    if write is None:
        return _unseen(trace, stale, names)
    fix, edit = detaching(trace)
    earlier = " of an earlier step" if fix else ""
    return Evidence(
        f"The optimizer step{place(write.site)} changed {changed} between the forward pass{earlier} that saved "
        f"{'it' if len(names) == 1 else 'them'}{place(first.save)} and its backward.{passed}",
        module=first.save.module if first.save else None,
        sites=sites_of(first),
        data={**data_of(first, others), "parameters": names},
        fix=fix
        or f"Run the backward pass before the step{place(write.site)}, or run the forward pass{place(first.save)} "
        "again after it.",
        edit=edit,
    )


def _unseen(trace: Trace, stale: tuple[StaleTensor, ...], names: list[str]) -> Evidence:
    """The step was neither watched nor replayed."""
    first, *others = stale
    them = "it" if len(names) == 1 else "them"
    return Evidence(
        f"{some(names)} changed between the forward pass that saved {them} and its backward. What changed {them} was "
        "not seen: an optimizer step, an averaging or a clip.",
        module=names[0].rpartition(".")[0],
        sites=trace.failure.sites[:1] if trace.failure is not None else (),
        data={**data_of(first, others), "parameters": names},
        fix=f"Run the backward pass before anything changes {some(names)}, or run the forward pass again after it.",
    )
