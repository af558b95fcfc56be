"""A rule: a pure function from a trace to evidence, with its code, severity, fix and documentation page."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ampcheck.source.printable import shown
from ampcheck.trace import Site, Trace

Judge = Callable[[Trace], Iterator["Evidence"]]


class Severity(enum.IntEnum):
    """How bad a finding is. ``ERROR``: training will crash, or compute something other than what was asked."""

    INFO = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Edit:
    """A fix that is a line: the line as it is, and what to write instead (two lines if it adds one)."""

    file: str
    line: int
    before: str
    after: str


@dataclass(frozen=True)
class Evidence:
    """What a rule saw: a full sentence with the names and numbers, and where. ``data`` holds the facts behind it as
    JSON values. ``severity`` and ``fix`` replace the rule's own if this case is milder, worse or more specific;
    ``edit`` is the fix as an edited line. ``told_by`` is the code of a rule that reports the same better, if it is
    judged too. ``situation`` names the one of the rule's situations that this is: hosts may have a fix for it alone.
    """

    message: str
    module: str | None = None
    sites: tuple[Site, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    severity: Severity | None = None
    fix: str | None = None
    edit: Edit | None = None
    told_by: str | None = None
    situation: str | None = None


@dataclass(frozen=True)
class Finding:
    """A rule's verdict on one piece of evidence. Findings compare by value. ``tried``: whether the step ran with the
    ``edit`` (``None``: not tried)."""

    code: str
    name: str
    severity: Severity
    message: str
    module: str | None = None
    sites: tuple[Site, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: str = ""
    host_fix: str | None = None
    edit: Edit | None = None
    tried: bool | None = None
    told_by: str | None = None


def told(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings without those that another of them reports better."""
    findings = tuple(findings)
    codes = {finding.code for finding in findings}
    return tuple(finding for finding in findings if finding.told_by not in codes)


@dataclass(frozen=True)
class Rule:
    """A rule. ``needs`` names the fields of ``Trace`` without which it cannot be judged (``"model"``,
    ``"training"``, ``"evaluation"``, ``"averaged"``...)."""

    code: str
    name: str
    severity: Severity
    fix: str
    needs: tuple[str, ...]
    judge: Judge

    def __reduce__(self) -> tuple[Any, ...]:
        # The rule's function cannot be pickled: in its module, its name stands for the rule.
        return _rule_at, (self.judge.__module__, self.judge.__name__)

    @property
    def page(self) -> str:
        """The rule's documentation: its function's docstring."""
        return inspect.cleandoc(self.judge.__doc__ or "")

    @property
    def summary(self) -> str:
        return self.page.partition("\n")[0]

    def missing(self, trace: Trace) -> str | None:
        """The first fact that the rule needs and the trace lacks, or ``None``."""
        return next((fact for fact in self.needs if getattr(trace, fact) is None), None)

    def __call__(self, trace: Trace) -> Iterator[Finding]:
        fixes = trace.host.fixes if trace.host else {}
        for evidence in self.judge(trace):
            yield Finding(
                code=self.code,
                name=self.name,
                severity=evidence.severity or self.severity,
                message=shown(evidence.message),
                module=evidence.module,
                sites=evidence.sites,
                evidence=evidence.data,
                fix=shown(evidence.fix) if evidence.fix else self.fix,
                host_fix=fixes.get(f"{self.code}:{evidence.situation}", fixes.get(self.code)) or None,
                edit=evidence.edit,
                told_by=evidence.told_by,
            )


def _rule_at(module: str, name: str) -> Rule:
    found: Rule = getattr(importlib.import_module(module), name)
    return found


def rule(code: str, severity: Severity, *, fix: str, needs: Iterable[str] = ()) -> Callable[[Judge], Rule]:
    """Make a rule from a generator of evidence; the function's name, in kebab case, becomes the rule's."""

    def decorate(judge: Judge) -> Rule:
        return Rule(code, judge.__name__.replace("_", "-"), severity, fix, tuple(needs), judge)

    return decorate
