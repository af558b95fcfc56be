from collections.abc import Iterator

from ampcheck.rules._words import place
from ampcheck.rules.rule import Evidence, Severity, rule
from ampcheck.trace import BakedConstant, Trace


@rule(
    "AMP602",
    Severity.ERROR,
    fix="Export with a plain PyTorch version of the function (`ampcheck.plain_kernels`), or register it with "
    "`torch.library.custom_op`.",
    needs=("comparison",),
)
def constant_baked_into_trace(trace: Trace) -> Iterator[Evidence]:
    """An activation computed outside the dispatcher was frozen into the graph as a constant.

    What it does
        Tracks, in the eager model, which tensors PyTorch's operations compute from the inputs. A tensor that changes
        with the inputs, but that no operation computed, came from NumPy, from a number read out of a tensor, or from
        an extension called through pybind. If the exported graph holds it as a constant (or as a blank tensor that the
        extension filled), names the module and the line.

    Why is this bad?
        The export returns the result for the example, whatever the input. On the example it is exact, so no check that
        reuses the example can see it.

    Example
        ```python
        def forward(self, value, locations, weights):
            return extension.deform_attn_forward(value, locations, weights)
        ```

    Use instead
        ```python
        with ampcheck.plain_kernels({"extension:deform_attn_forward": deform_attn_in_pytorch}):
            exported = torch.jit.trace(model, example)
        ```

    References
        - https://github.com/open-mmlab/mmdetection/issues/11371
        - https://pytorch.org/tutorials/advanced/custom_ops_landing_page.html
    """
    comparison = trace.comparison
    assert comparison is not None
    for constant in comparison.constants:
        shape = f"{constant.dtype}{list(constant.shape)}"
        where = constant.module or "the model"
        yield Evidence(
            f"The {comparison.second} holds an activation of {where} ({shape}) as a constant. It is computed outside "
            f"the dispatcher{place(constant.site)}, and changes with the inputs.",
            module=constant.module,
            sites=(constant.site,) if constant.site else (),
            data={
                "dtype": constant.dtype,
                "shape": list(constant.shape),
                "target": constant.target,
                "remedy": _remedy(constant),
            },
            fix=_fix(constant),
        )


def _fix(constant: BakedConstant) -> str | None:
    if constant.target is None:
        return "Compute it with tensor operations instead of NumPy and Python numbers."
    return (
        f'Export under `with ampcheck.plain_kernels({{"{constant.target}": plain}}):`, where `plain` computes the same '
        "with tensor operations, or register it with `torch.library.custom_op`."
    )


def _remedy(constant: BakedConstant) -> str | None:
    """The code to write, if the function is known."""
    if constant.target is None:
        return None
    name = constant.target.rpartition(":")[2].rpartition(".")[2]
    return (
        f"def {name}_plain(*args):\n"
        f"    ...  # the same as {name}, in tensor operations\n\n"
        f'with ampcheck.plain_kernels({{"{constant.target}": {name}_plain}}):\n'
        f"    exported = torch.jit.trace(model, example)\n"
        f"print(ampcheck.compare(model, exported, example))\n"
    )
