"""The text form of a comparison: verdict, outputs, and the modules that differ most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from ampcheck.rules.rule import Finding, Severity
from ampcheck.trace import Comparison, ModuleError

_SHOWN = 10


def comparison_lines(comparison: Comparison, name: str, findings: Sequence[Finding] = ()) -> Iterator[Text]:
    """``ampcheck  TorchScript trace against eager · equal on 5 inputs``, what was compared, and a table."""
    wrong = any(finding.severity is Severity.ERROR for finding in findings)
    yield Text.assemble(
        (name, "bold"),
        f"  {comparison.second} against {comparison.first} · ",
        _verdict(comparison, wrong),
        f" on {_inputs(comparison)}",
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
    if comparison.left_out is not None:
        yield Text(f"   inputs  {comparison.left_out}")
    if comparison.unseen is not None:
        yield Text(f"   modules  not compared: {comparison.unseen}")
    if comparison.modules and (not comparison.export or not comparison.equal):
        yield from _table(comparison.ranked()[:_SHOWN])


def verdict_line(comparison: Comparison) -> Text:
    """``equal to the eager model on 5 inputs``"""
    count = len(comparison.inputs)
    text = Text.assemble(_verdict(comparison, False), f" on {count} input{'' if count == 1 else 's'}")
    return text.append(f" ({comparison.left_out})" if comparison.left_out is not None else "")


def _verdict(comparison: Comparison, wrong: bool) -> tuple[str, str]:
    """One word or two. ``wrong``: a finding says that the export is wrong, even where its outputs cannot show it."""
    if not comparison.export:
        return ("within tolerance", "green") if comparison.equal else ("not within tolerance", "yellow")
    if wrong or not comparison.equal:
        return "differs", "bold red"
    if any(cause.reason == "unsettled" for cause in comparison.causes):
        return "equal where rounding does not decide", "yellow"
    return "equal", "green"


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
