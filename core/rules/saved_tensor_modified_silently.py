from collections.abc import Iterator

from ampcheck.rules._stale import Remedy, cause, data_of, module_of, passed_by_pytorch, remedy, sites_of, what
from ampcheck.rules._words import place, sentence
from ampcheck.rules.rule import Edit, Evidence, Severity, rule
from ampcheck.trace import Site, StaleTensor, Trace

_HOW = {
    "untracked": "through `.data` or another alias with its own version counter, so PyTorch does not notice",
    "hooks": "and saved-tensor hooks keep PyTorch from noticing",
    "outside": "from outside PyTorch (a NumPy array that shares its memory, say), so PyTorch does not notice",
}


@rule(
    "AMP402",
    Severity.ERROR,
    fix="Use the out-of-place operation, or move the write ahead of the first use of the value in the forward pass.",
    needs=("graph",),
)
def saved_tensor_modified_silently(trace: Trace) -> Iterator[Evidence]:
    """A saved tensor was overwritten without PyTorch noticing, and backward used the wrong value.

    What it does
        Compares what backward reads with the writes since autograd saved it: through `.data`, a detached alias with
        its own version counter, a NumPy array, saved-tensor hooks, or a custom function without `mark_dirty`.

    Why is this bad?
        Nothing raises. The gradients belong to a different function than the one that was computed, and training goes
        on with them.

    Example
        ```python
        attention = scores.softmax(-1)
        attention.data[mask] = 0
        ```

    Use instead
        ```python
        attention = scores.softmax(-1).masked_fill(mask, 0)
        ```

    References
        - https://pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
        - https://pytorch.org/docs/stable/autograd.html#torch.autograd.function.FunctionCtx.mark_dirty
    """
    told: dict[object, tuple[StaleTensor, list[StaleTensor]]] = {}
    for stale in passed_by_pytorch(trace):
        if cause(stale) == "write":
            key = (sites_of(stale), stale.silent)
            if key in told:
                told[key][1].append(stale)
            else:
                told[key] = stale, []
    for first, others in told.values():
        fix, edit = _remedy(trace, first)
        yield Evidence(
            sentence(_message(first)),
            module=module_of(first),
            sites=sites_of(first),
            data={**data_of(first, others), "how": first.silent},
            fix=fix,
            edit=edit,
        )


def _message(stale: StaleTensor) -> str:
    if stale.silent == "unmarked":
        return (
            f"{stale.node} overwrote its input without `ctx.mark_dirty`, and the input was used again"
            f"{place(stale.save)}: its gradient ignores the write."
        )
    return f"{what(stale)} was overwritten before backward used it, {_HOW[stale.silent or 'untracked']}."


def _remedy(trace: Trace, stale: StaleTensor) -> Remedy:
    if stale.silent == "unmarked":
        return Remedy(
            "Call `ctx.mark_dirty(x)` in `forward` for each input `x` that it writes to and return `x`, or write to a "
            "copy."
        )
    if stale.silent == "outside":
        return _copied_array(stale.shared)
    return remedy(trace, stale)


def _copied_array(shared: Site | None) -> Remedy:
    call = ".numpy()"
    if shared is None or shared.code.count(call) != 1:
        return Remedy(f"Give NumPy a copy{place(shared)}: `x.detach().cpu().numpy().copy()`.")
    after = shared.code.replace(call, f"{call}.copy()")
    return Remedy(
        f"Give NumPy a copy: write `{after}` at {shared}.", Edit(shared.file, shared.line, shared.code, after)
    )
