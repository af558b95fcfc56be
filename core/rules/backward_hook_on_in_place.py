from collections.abc import Iterator

from ampcheck.rules._stale import as_write, inplace_type, library_line
from ampcheck.rules._words import place, some
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import BackwardHookView, Trace


@rule(
    "AMP410",
    Severity.ERROR,
    fix="Register the hook on a tensor (`output.register_hook(hook)`), or build the module next to it without "
    "`inplace=True`.",
    needs=("failure",),
)
def backward_hook_on_in_place(trace: Trace) -> Iterator[Evidence]:
    """The input or output of a module with a full backward hook is modified in place.

    What it does
        Names the line that writes, and the modules of the model that have full backward hooks.

    Why is this bad?
        A full backward hook wraps the inputs and outputs of its module in views that must not be modified. An in-place
        activation before or after the module stops the forward pass.

    Example
        ```python
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        net[0].register_full_backward_hook(hook)
        ```

    Use instead
        ```python
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        net[0].register_full_backward_hook(hook)
        ```

    References
        - https://pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.register_full_backward_hook
        - https://github.com/pytorch/pytorch/issues/61519
    """
    failure = trace.failure
    if failure is None or not isinstance(failure.facts, BackwardHookView):
        return
    site = as_write(failure.sites[0]) if failure.sites else None
    hooked = trace.graph.hooked if trace.graph is not None else ()
    names = [f"module {name}" if name else "the model itself" for name in hooked]
    library = library_line(failure.sites)
    kind = inplace_type(trace, failure.module)
    fix = (
        f"Build the {kind} `{failure.module}`{f' ({library})' if library else ''} with `inplace=False`, or register "
        "the hook on a tensor: `output.register_hook(hook)`."
    )
    yield Evidence(
        f"A tensor that a full backward hook wraps was modified in place{place(site)}"
        f"{f'; full backward hooks are on {some(names)}' if names else ''}.",
        module=failure.module,
        sites=(site,) if site else (),
        data={"hooked": list(hooked), **({"written_in": f"{library.file}:{library.line}"} if library else {})},
        fix=fix if kind is not None else None,
    )
