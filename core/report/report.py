"""The report: findings, and what they were judged on."""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from ampcheck.report.text import render
from ampcheck.rules.rule import Edit, Finding, Severity
from ampcheck.source.lines import short_path
from ampcheck.trace import Comparison, Export, ModuleCall, Site, Trace
from ampcheck.version import __version__

SCHEMA = "ampcheck/1"


@dataclass(frozen=True)
class Report:
    """Findings on a trace, most severe first.

    ``not_judged`` maps the codes of rules that could not be judged to the reason. ``str(report)`` is the text form,
    ``to_dict()`` the JSON form.
    """

    trace: Trace
    findings: tuple[Finding, ...] = ()
    not_judged: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.rendered().plain

    def rendered(self) -> Text:
        """The text form with colours."""
        return render(self.trace, self.findings, self.not_judged)

    @property
    def comparison(self) -> Comparison | None:
        """What ``ampcheck.compare`` found by running both models."""
        return self.trace.comparison

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, in the schema ``ampcheck/1``, to which fields are added but never changed."""
        trace = self.trace
        precision, failure, host = trace.precision, trace.failure, trace.host
        return {
            "schema": SCHEMA,
            "ampcheck": __version__,
            "torch": trace.environment.torch,
            "host": {"name": host.name, "version": host.version} if host else None,
            "precision": {
                "mode": precision.mode,
                "device_type": precision.device_type,
                "dtype": precision.dtype,
                "scaler": precision.scaler,
                "source": precision.source,
            },
            "findings": [_finding(finding) for finding in self.findings],
            "not_judged": [{"code": code, "reason": reason} for code, reason in self.not_judged.items()],
            "failure": None
            if failure is None
            else {"type": failure.type, "message": failure.message, "phase": failure.phase, "step": failure.step},
            "modules": _modules(trace),
            **({"comparison": _comparison(trace.comparison)} if trace.comparison is not None else {}),
            **({"exports": [_export(export) for export in trace.exports]} if trace.exports else {}),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form, as ``write_json`` does."""
        write_json(path, self.to_dict())


def write_json(path: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write the JSON form of a report.

    Replaces a regular file as a whole, so that a reader never sees half a report. Writes into anything else (a
    pipe, a device), and follows links. Raises ``OSError``.
    """
    text = json.dumps(report, indent=1, default=str) + "\n"
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        _write_to(path, text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".ampcheck-{secrets.token_hex(8)}")
    # Created with the permissions that the user's umask leaves.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_to(path: Path, text: str) -> None:
    # Opening a pipe that nobody reads would wait for a reader.
    handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        if hasattr(os, "set_blocking"):
            os.set_blocking(handle, True)
        file.write(text)


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": str(finding.severity),
        "message": finding.message,
        "module": finding.module,
        "sites": [_site(site) for site in finding.sites],
        "evidence": dict(finding.evidence),
        "fix": finding.fix,
        "host_fix": finding.host_fix,
        **({} if finding.edit is None else {"edit": _edit(finding.edit)}),
        **({} if finding.tried is None else {"tried": finding.tried}),
    }


def _edit(edit: Edit) -> dict[str, Any]:
    return asdict(edit) | {"file": short_path(edit.file)}


def _site(site: Site) -> dict[str, Any]:
    required = {"role": site.role, "file": short_path(site.file), "line": site.line, "function": site.function}
    optional = {name: getattr(site, name) for name in ("code", "module", "op", "node", "slot")}
    return required | {name: value for name, value in optional.items() if value is not None}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    first = comparison.first_module
    return {
        "first": comparison.first,
        "second": comparison.second,
        "equal": comparison.equal,
        "inputs": list(comparison.inputs),
        "tolerances": [asdict(tolerance) for tolerance in comparison.tolerances],
        "outputs": [_finite(asdict(output)) for output in comparison.outputs],
        "first_module": first.module if first is not None else None,
        "modules": [_finite(asdict(module)) for module in comparison.modules],
        "modules_unseen": comparison.unseen,
        **({} if comparison.left_out is None else {"left_out": comparison.left_out}),
    }


def _export(export: Export) -> dict[str, Any]:
    failure, comparison = export.failure, export.comparison
    return {
        "function": export.function,
        "model": export.model,
        "site": _site(export.site) if export.site is not None else None,
        **({} if export.left_out is None else {"left_out": export.left_out}),
        **({} if comparison is None else {"comparison": _comparison(comparison)}),
        **({} if failure is None else {"failure": {"type": failure.type, "message": failure.message}}),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities by null: JSON has none."""
    return {key: None if value in (math.inf, -math.inf) else value for key, value in values.items()}


def _headroom(trace: Trace, module: str) -> dict[str, float]:
    """The bits between the largest float16 output of a module and float16's largest number, if it was measured."""
    largest = trace.training.outputs.get(module) if trace.training is not None else None
    return {"headroom_bits": round(math.log2(65504.0 / largest), 2)} if largest else {}


def _modules(trace: Trace) -> list[dict[str, Any]]:
    if trace.model is None:
        return []
    calls: dict[str | None, list[ModuleCall]] = {}
    for call in trace.training.calls if trace.training else ():
        if not call.in_backward:
            calls.setdefault(call.module, []).append(call)
    rows = []
    for module in trace.model.modules:
        own = calls.get(module.name, [])
        states: Counter[str] = Counter()
        for call in own:
            states[call.autocast.dtype if call.autocast.enabled else "off"] += call.count
        rows.append(
            {
                "name": module.name,
                "type": module.type,
                "parameters": dict(module.parameters),
                "buffers": dict(module.buffers),
                "calls": sum(call.count for call in own),
                "autocast": states.most_common(1)[0][0] if states else None,
                "inputs": list(own[0].inputs) if own else [],
                "outputs": list(own[0].outputs) if own else [],
                **_headroom(trace, module.name),
            }
        )
    return rows
