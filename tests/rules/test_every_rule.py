"""Every rule has a hand-built trace that triggers it, and a twin that does not."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from ampcheck.rules import RULES
from ampcheck.rules.judging import judge
from ampcheck.trace import GraphTrace, StepTrace, Trace

FILES = sorted(path.stem for path in Path(__file__).parent.glob("test_*_rules.py"))
PAIRS: list[tuple[str, Trace, Trace]] = [
    pair for file in FILES for pair in getattr(importlib.import_module(file), "PAIRS", ())
]

each_pair = pytest.mark.parametrize(("code", "faulty", "twin"), PAIRS, ids=[code for code, _, _ in PAIRS])


def judged(code: str, trace: Trace) -> set[str]:
    """What all rules find, where the rule ``code`` has the facts that it needs."""
    (rule,) = (rule for rule in RULES if rule.code == code)
    assert rule.missing(trace) is None
    return {finding.code for finding in judge(trace, RULES)[0]}


def observed(trace: Trace) -> set[str]:
    """The names of the facts that a trace holds."""
    nothing = None, (), StepTrace(), GraphTrace()
    return {field.name for field in dataclasses.fields(trace) if getattr(trace, field.name) not in nothing}


def test_every_rule_has_a_pair():
    assert {code for code, _, _ in PAIRS} == {rule.code for rule in RULES}


@each_pair
def test_the_faulty_trace_triggers_the_rule(code, faulty, twin):
    assert code in judged(code, faulty)


@each_pair
def test_its_twin_does_not(code, faulty, twin):
    assert code not in judged(code, twin)


@each_pair
def test_the_twin_holds_the_same_facts(code, faulty, twin):
    # That AmpCheck itself failed is no fact about the training.
    assert observed(faulty) - {"internal_error"} <= observed(twin)
