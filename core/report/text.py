"""The text form: one line when all is well, and a block per finding with the source lines that matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.text import Text

from ampcheck.precision import LOW_PRECISION
from ampcheck.report.comparison import comparison_lines, verdict_line
from ampcheck.rules.rule import Finding, Severity
from ampcheck.source.lines import short_path
from ampcheck.source.printable import shown
from ampcheck.trace import Export, ModelInfo, Site, StepTrace, Trace

NAME = "ampcheck"
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
_WIDTH = 100
_UNITS = ((10**9, "B"), (10**6, "M"), (10**3, "k"))
_DONE = {
    "origin": "not finite from here",
    "write": "written here",
    "save": "saved here",
    "raise": "raised here",
    "cast": "cast here",
    "call": "here",
}


def render(trace: Trace, findings: Sequence[Finding], not_judged: Mapping[str, str]) -> Text:
    """The whole report: fit start, what was watched, the findings and what was not judged."""
    if trace.comparison is not None:
        blocks = list(comparison_lines(trace.comparison, NAME, findings))
        return Text("\n").join([*blocks, *(render_finding(finding, trace) for finding in findings)])
    lines = [fit_line(trace, findings)]
    for phase, step in (("training", trace.training), ("evaluation", trace.evaluation)):
        if step is not None:
            lines.append(step_line(phase, step))
    lines += map(export_line, trace.exports)
    blocks = [*lines, *(render_finding(finding, trace) for finding in findings)]
    if not_judged:
        blocks.append(not_judged_line(not_judged))
    return Text("\n").join(blocks)


def fit_line(trace: Trace, findings: Sequence[Finding] | None = None) -> Text:
    """``ampcheck  mixed float16 on cuda, loss scaling on · 23.5 M parameters float32 · 161 modules · no findings``"""
    parts = [str(trace.precision)]
    if trace.model is not None:
        parts += [_parameters(trace.model), _plural(len(trace.model.modules), "module")]
    return _line(parts, findings)


def step_line(phase: str, step: StepTrace, findings: Sequence[Finding] | None = None) -> Text:
    """``ampcheck  watched training step · 161 module calls, 158 under autocast bfloat16, 3 outside · no findings``"""
    states: Counter[str] = Counter()
    for call in step.calls:
        if not call.in_backward:
            states[f"under autocast {call.autocast.dtype}" if call.autocast.enabled else ""] += call.count
    outside = states.pop("", 0)
    total = outside + sum(states.values())
    if not states:
        calls = f"{_plural(total, 'module call')}, none under autocast"
    else:
        calls = ", ".join([_plural(total, "module call"), *(f"{n} {state}" for state, n in states.most_common())])
        calls += f", {outside} outside" if outside else ""
    cast = Counter(d for call in step.calls for d in call.parameters if not call.in_backward and d in LOW_PRECISION)
    calls += "".join(f", {n} with {dtype} parameters" for dtype, n in cast.most_common())
    plural = f"{step.steps} {phase} steps" if step.steps > 1 else f"{phase} step"
    return _line([f"watched {plural}", calls], findings)


def export_line(export: Export) -> Text:
    """``ampcheck  torch.jit.trace of Net at train.py:30 · equal to the eager model on 5 inputs``"""
    at = f" at {export.site}" if export.site is not None else ""
    text = Text.assemble((NAME, "bold"), f"  {export.function} of {shown(export.model)}{at} · ")
    if export.failure is not None:
        return text.append(f"failed: {export.failure.type}", "bold red")
    if export.comparison is None:
        return text.append(f"not compared: {export.left_out}")
    return text.append_text(verdict_line(export.comparison))


def not_judged_line(not_judged: Mapping[str, str]) -> Text:
    """The rules that could not be judged, by reason."""
    reasons: dict[str, list[str]] = {}
    for code, reason in not_judged.items():
        reasons.setdefault(reason, []).append(code)
    text = "; ".join(f"{', '.join(codes)} ({reason})" for reason, codes in reasons.items())
    return Text.assemble((NAME, "bold"), f"  not judged: {text}")


def render_finding(finding: Finding, trace: Trace) -> Text:
    """A finding: heading, source lines by file, fix, the host's fix, and where to read more."""
    text = Text()
    text.append(f"{finding.severity}[{finding.code}]", _STYLES[finding.severity])
    text.append(f" {finding.name}: ", "bold")
    text.append(finding.message)
    for file, sites in _by_file(finding.sites):
        text.append(f"\n   {short_path(file)}", "blue")
        margin = max(len(str(site.line)) for site in sites)
        for site in sites:
            text.append(f"\n   {site.line:>{margin}} │ ", "dim")
            text.append(site.code or "(source not available)")
            text.append(f"\n   {'':>{margin}} │     ", "dim")
            text.append(_said_of(site, finding.evidence), "italic")
    if finding.fix:
        text.append("\n   fix   ", "bold green")
        text.append(finding.fix)
        if finding.tried:
            text.append(" Tried on this batch: the step then runs.")
    if finding.host_fix and trace.host:
        text.append(f"\n   {trace.host.name:<5} ", "bold green")
        text.append(finding.host_fix)
    text.append("\n   more  ", "bold")
    text.append(f"ampcheck explain {finding.code}")
    return text


def _said_of(site: Site, evidence: Mapping[str, Any]) -> str:
    words = [_DONE[site.role]]
    by = site.node or site.op if site.role == "save" else site.op or site.node
    if by:
        words.append(f"by {by}")
    if site.slot:
        words.append(f"as `{site.slot}`")
    saved, found = evidence.get("version_saved"), evidence.get("version_found")
    if site.role == "save" and saved is not None and evidence.get("dtype"):
        shape = ", ".join(map(str, evidence.get("shape", ())))
        words[-1] += f": {evidence['dtype']}[{shape}], version {saved}"
    elif site.role == "write" and None not in (saved, found) and saved != found:
        words[-1] += f": version {saved} → {found}"
    return f"{' '.join(words)} in {site.module or site.function}"


def _by_file(sites: Iterable[Site]) -> list[tuple[str, list[Site]]]:
    files: dict[str, list[Site]] = {}
    for site in sites:
        files.setdefault(site.file, []).append(site)
    return [(file, sorted(group, key=lambda site: site.line)) for file, group in files.items()]


def _line(parts: Iterable[str], findings: Sequence[Finding] | None) -> Text:
    text = Text.assemble((NAME, "bold"), "  " + " · ".join(parts))
    if findings is not None:
        text.append(" · ")
        text.append_text(_count(findings))
    return text


def _count(findings: Sequence[Finding]) -> Text:
    if not findings:
        return Text("no findings", "green")
    counts = Counter(finding.severity for finding in findings)
    parts = [
        Text(_plural(counts[severity], str(severity)), _STYLES[severity]) for severity in sorted(counts, reverse=True)
    ]
    return Text(", ").join(parts)


def _parameters(model: ModelInfo) -> str:
    elements: Counter[str] = Counter()
    for tensor in model.parameters:
        size = 1
        for length in tensor.shape:
            size *= length
        elements[tensor.dtype] += size
    if not elements:
        return "no parameters"
    (first, count), *others = elements.most_common()
    text = f"{_human(count)} parameter{'' if count == 1 else 's'} {first}"
    return ", ".join([text, *(f"{_human(n)} {dtype}" for dtype, n in others)])


def _human(count: int) -> str:
    for unit, suffix in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {suffix}"
    return str(count)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
