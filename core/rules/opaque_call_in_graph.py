from collections.abc import Iterator

from ampcheck.rules._words import count, place, places
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import OpaqueCall, Trace

_KINDS = {
    "python": "a Python function",
    "autograd-function": "a custom autograd function",
    "no-schema": "an operator without a schema",
}


@rule(
    "AMP603",
    Severity.WARNING,
    fix="Register it with `torch.library.custom_op`, or export a plain PyTorch version (`ampcheck.plain_kernels`).",
    needs=("comparison",),
)
def opaque_call_in_graph(trace: Trace) -> Iterator[Evidence]:
    """The exported graph calls code that only this Python process can run.

    What it does
        Lists the nodes of the graph that call Python (`prim::PythonOp`, custom autograd functions) or an operator
        without a schema.

    Why is this bad?
        The graph is exact here, where the Python function exists. It cannot be saved, or fails where it is loaded.

    Example
        ```python
        class Round(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.round()

            @staticmethod
            def backward(ctx, gradient):
                return gradient


        exported = torch.jit.trace(lambda x: Round.apply(x), example)
        ```

    Use instead
        ```python
        @torch.library.custom_op("mine::round", mutates_args=())
        def rounded(x: torch.Tensor) -> torch.Tensor:
            return x.round()


        rounded.register_autograd(lambda ctx, gradient: gradient)
        ```

    References
        - https://pytorch.org/docs/stable/library.html#torch.library.custom_op
        - https://pytorch.org/docs/stable/jit.html
    """
    comparison = trace.comparison
    assert comparison is not None
    calls: dict[tuple[str, str], list[OpaqueCall]] = {}
    for call in comparison.opaque:
        calls.setdefault((call.kind, call.name), []).append(call)
    for (kind, name), found in calls.items():
        first = found[0]
        often = f" ({count(len(found), 'call')})" if len(found) > 1 else ""
        yield Evidence(
            f"The {comparison.second} calls {_KINDS[kind]}, `{name}`, in {first.module or 'the model'}"
            f"{place(first.site)}{often}.",
            module=first.module,
            sites=places(call.site for call in found),
            data={"kind": kind, "name": name, "modules": [call.module for call in found]},
        )
