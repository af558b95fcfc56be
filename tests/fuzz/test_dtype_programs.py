"""Programs of random dtypes: what PyTorch refuses is told with line, module and operands, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dtype_programs import Called, Loaded, Outcome, Program, programs
from hypothesis import given, settings

from ampcheck import AmpChecker, Finding, Severity

CODES = {"AMP203", "AMP205", "AMP206", "AMP207", "AMP209", "AMP210", "AMP212"}


def watched(loaded: Loaded) -> tuple[Outcome, tuple[Finding, ...]]:
    net = loaded.net()
    told: list[str] = []
    checker = AmpChecker(report=False)
    checker.attach(net, emit=told.append)
    error = None
    try:
        with checker.training_step():
            loaded.train(net)
    except Exception as raised:  # noqa: BLE001 - it is looked at
        error = raised
        checker.diagnose(raised, phase="training_step")
    outcome, report = loaded.outcome(net, error), checker.report
    checker.detach()
    assert not any("AMP900" in line for line in told), told
    assert report is not None
    return outcome, report.findings


def judge(loaded: Loaded, plain: Outcome, found: tuple[Finding, ...], count: Callable[[str], None]) -> None:
    errors = [finding for finding in found if finding.severity is Severity.ERROR]
    if plain.error is None:
        count("completed")
        if errors:
            count("false")
        assert not errors
        return
    count("raised")
    told = [finding for finding in errors if finding.code in CODES]
    if not told:
        count("missed")
        raise AssertionError(f"missed: {plain.error}")
    # A crash inside a custom function is told twice, by two rules, and shown once.
    (finding,) = [finding for finding in told if finding.told_by is None]
    count(finding.code)
    raised = [site.line for site in finding.sites if site.role == "raise" and site.file == loaded.path]
    called = loaded.called()
    operands = finding.evidence["operands"]
    dtypes = {operand["dtype"] for operand in operands}
    reason = finding.evidence.get("reason")
    try:
        if reason != "custom-function":
            assert plain.line is None or raised == [plain.line]
        if called.module is not None:
            assert finding.module == called.module
        # What a function of many operations was given is not what failed in it.
        if called.name and called.name != "multi_head_attention_forward":
            assert dtypes <= called.dtypes
        if finding.code == "AMP203":
            count(f"reason {reason}")
            if plain.line is not None and reason != "cached-cast" and "prioritize" not in str(plain.error):
                assert len(dtypes) > 1
            assert_reason(reason, loaded, plain, called)
    except AssertionError:
        count("false")
        raise


def assert_reason(reason: str, loaded: Loaded, plain: Outcome, called: Called) -> None:
    """What the program itself says of the region around the line that failed."""
    if plain.line is None:
        return
    statement = loaded.program.source.splitlines()[plain.line - 1]
    if reason == "autocast-disabled-here":
        assert "enabled=False" in statement
    elif reason == "autocast-never-entered":
        assert loaded.program.region is None
        assert "autocast" not in statement
    elif reason in ("op-unknown-to-autocast", "float64-operand", "cached-cast", "promotion-refused"):
        assert called.enabled
        assert reason != "float64-operand" or "float64" in called.dtypes
        assert reason != "cached-cast" or {"torch.bfloat16", "torch.float16"} <= set(
            re.findall(r"torch\.b?float16", f"{loaded.program.source} {loaded.program.region}")
        )
    elif reason == "parameter-not-float32":
        assert {"float16", "bfloat16"} & set(loaded.program.dtypes.values())
    elif reason == "custom-function":
        assert "Product.apply" in statement
    elif reason == "in-place-or-out":
        assert "out=" in statement or "_(" in statement


def check(program: Program, folder: Path, count: Callable[[str], None]) -> None:
    loaded, reference = program.load(folder), program.in_float32().load(folder)
    try:
        plain = loaded.run()
        outcome, found = watched(loaded)
        count("programs")
        assert type(outcome.error) is type(plain.error)
        assert str(outcome.error) == str(plain.error)
        assert outcome.line == plain.line
        for one, other in zip(outcome.state, plain.state, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25)), "not bit-identical"
        if plain.error is not None and reference.run().error is not None:
            count("other errors")
            return
        judge(loaded, plain, found, count)
    except AssertionError as error:
        told = [(finding.code, finding.message, finding.evidence.get("reason")) for finding in found]
        error.args = (f"{error}\n{plain.error}, line {plain.line}\n{told}\n{program}\n{program.source}",)
        raise
    finally:
        loaded.close()
        reference.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@settings(max_examples=4 * settings.default.max_examples)
@given(program=programs())
def test_dtype_programs(program: Program, folder: Path, count: Callable[[str], None]) -> None:
    check(program, folder, count)
