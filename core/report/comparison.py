"""The text form of a comparison: verdict, outputs, and the modules that differ most."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from ampcheck.trace import Comparison, ModuleError

_SHOWN = 10


def comparison_lines(comparison: Comparison, name: str) -> Iterator[Text]:
    """``ampcheck  TorchScript trace against eager · equal on 5 inputs``, what was compared, and a table."""
    verdict = ("equal", "green") if comparison.equal else ("differs", "bold red")
    if comparison.equal and any(cause.reason == "unsettled" for cause in comparison.causes):
        verdict = ("equal where rounding does not decide", "yellow")
    if not comparison.export:
        verdict = ("within tolerance", "green") if comparison.equal else ("not within tolerance", "yellow")
    yield Text.assemble(
        (name, "bold"), f"  {comparison.second} against {comparison.first} · ", verdict, f" on {_inputs(comparison)}"
    )
    for output in comparison.outputs:
        yield Text(
            f"   {output.output} {output.dtype}{list(output.shape)}: largest absolute error {output.absolute:.3g}, "
            f"relative {output.relative:.3g} ({output.inputs})"
        )
    yield Text(f"   tolerance  {'; '.join(map(str, comparison.tolerances))}")
    first = comparison.first_module
    if first is not None and not comparison.equal:
        yield Text(f"   first module whose output differs  {first.module or '(the model)'}")
    if comparison.unseen is not None:
        yield Text(f"   modules  not compared: {comparison.unseen}")
    if comparison.modules and (not comparison.export or not comparison.equal):
        yield from _table(comparison.ranked()[:_SHOWN])


def _inputs(comparison: Comparison) -> str:
    count = len(comparison.inputs)
    return ", ".join(comparison.inputs) if count < 3 else f"{count} inputs ({', '.join(comparison.inputs)})"


def _table(modules: list[ModuleError]) -> Iterator[Text]:
    names = [(module.module or "(the model)") + (f" #{module.call + 1}" if module.call else "") for module in modules]
    width = max(map(len, names))
    kind = max(len(module.type) for module in modules)
    yield Text(f"   {'module':<{width}}  {'':<{kind}}  relative  absolute", "bold")
    for name, module in zip(names, modules, strict=True):
        yield Text(
            f"   {name:<{width}}  {module.type:<{kind}}  {module.relative:<8.2g}  {module.absolute:<8.2g}",
            "" if module.equal else "red",
        )
