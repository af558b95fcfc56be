"""Selecting rules and judging a trace by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ampcheck.rules import RULES
from ampcheck.rules.rule import Finding, Rule, Severity, told
from ampcheck.trace import Export, Trace


def selected(select: str | Iterable[str] = (), ignore: str | Iterable[str] = ()) -> tuple[Rule, ...]:
    """The rules whose code starts with one of ``select`` (empty: all) and with none of ``ignore``.

    Both take codes or prefixes (``"AMP101"``, ``"AMP2"``), comma-separated or as several strings. Raises
    ``ValueError`` for a prefix that matches no rule.
    """
    wanted, unwanted = _prefixes(select), _prefixes(ignore)
    return tuple(
        rule for rule in RULES if (not wanted or rule.code.startswith(wanted)) and not rule.code.startswith(unwanted)
    )


def judge(
    trace: Trace, rules: Iterable[Rule], *, failed: Trace | None = None
) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """Judge a trace by ``rules``: the findings, most severe first, and by code why a rule could not be judged.

    What another rule reports better is left to it. A rule about what this run does not have (a failure, an averaged
    copy) finds nothing. Rules about a failure judge
    ``failed``, if given: the trace with what the step showed that failed.
    """
    findings: list[Finding] = []
    not_judged: dict[str, str] = {}
    for rule in rules:
        judged = failed if failed is not None and "failure" in rule.needs else trace
        missing = rule.missing(judged)
        if missing is None:
            findings.extend(rule(judged))
        elif missing in judged.unobserved:
            not_judged[rule.code] = judged.unobserved[missing]
        elif missing in ("comparison", "export_failure"):
            findings.extend(found for export in trace.exports for found in _judged(rule, trace, export))
    return tuple(sorted(told(findings), key=lambda finding: (-finding.severity, finding.code))), not_judged


def _judged(rule: Rule, trace: Trace, export: Export) -> Iterator[Finding]:
    """What a rule finds in an export of the run, with the line that made the export."""
    alone = replace(trace, comparison=export.comparison, export_failure=export.failure)
    for finding in rule(alone) if rule.missing(alone) is None else ():
        yield replace(finding, sites=(*finding.sites, *([export.site] if export.site is not None else ())))


def reaching(findings: Iterable[Finding], severity: Severity | None) -> tuple[Finding, ...]:
    """The findings of at least this severity."""
    return tuple(f for f in findings if severity is not None and f.severity >= severity)


def threshold(fail_on: str) -> Severity | None:
    """The severity that ``fail_on`` names; ``None`` for ``"never"``. Raises ``ValueError`` for another word."""
    if fail_on == "never":
        return None
    if fail_on not in ("error", "warning"):
        raise ValueError(f"fail_on must be 'error', 'warning' or 'never', not {fail_on!r}")
    return Severity[fail_on.upper()]


def _prefixes(codes: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(codes, str):
        codes = codes.split(",")
    prefixes = tuple(code.strip().upper() for code in codes if code.strip())
    for prefix in prefixes:
        if not any(rule.code.startswith(prefix) for rule in RULES):
            raise ValueError(f"no rule's code begins with {prefix!r}; `ampcheck rules` lists them")
    return prefixes
