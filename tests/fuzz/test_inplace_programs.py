"""Programs that write in place: what plain PyTorch refuses is named, what it gets wrong is seen, nothing else is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from inplace_programs import Loaded, Outcome, Program, Truth, programs, same_gradients

from ampcheck import AmpChecker, Finding, Severity

# What PyTorch says, in short, and the codes that may tell it.
SAID = {
    "modified by an inplace operation": ("AMP401", "AMP405", "AMP407"),
    "a view of a leaf Variable": ("AMP404",),
    "a leaf Variable that requires grad": ("AMP403",),
    "is a view and is being modified inplace": ("AMP404",),
    "is a view and its base or another view": ("AMP404",),
    "A view was created in no_grad mode": ("AMP404",),
    "This view was created inside a custom Function": ("AMP404",),
    "second time": ("AMP408",),
    "does not require grad": ("AMP408",),
}


class Wrong(AssertionError):
    """AmpCheck missed something, or named the wrong thing."""


def watched(loaded: Loaded) -> tuple[Outcome, tuple[Finding, ...]]:
    """The run under a checker, as a host does it."""
    net = loaded.net()
    told: list[str] = []
    checker = AmpChecker(report=False)
    checker.attach(net, optimizers=[net.optimizer], emit=told.append)
    try:
        with checker.training_step():
            loss = loaded.loss(net)
            loss.backward()
        error = None
    except Exception as raised:  # noqa: BLE001 - it is looked at
        error = raised
        checker.diagnose(raised, phase="training_step")
    outcome = loaded.outcome(net, error)
    report = checker.report
    checker.detach()
    assert not any("AMP900" in line for line in told), told
    assert report is not None
    return outcome, report.findings


def lines(loaded: Loaded, finding: Finding, role: str) -> list[int]:
    return [site.line for site in finding.sites if site.role == role and site.file == loaded.path]


def judge(
    loaded: Loaded, plain: Outcome, truth: Truth, found: tuple[Finding, ...], count: Callable[[str], None]
) -> None:
    errors = [finding for finding in found if finding.severity is Severity.ERROR]
    codes = [finding.code for finding in errors]
    if plain.error is None:
        count("completed")
        wrong = not same_gradients(plain.gradients, truth.gradients)
        if wrong:
            count("silent")
            # NumPy's writes to parameters and buffers are not looked for: others may share their memory.
            if ".numpy()" in loaded.program.source and {save.key for save in truth.overwritten} <= truth.stored:
                count("silent, not claimed")
            elif not {"AMP402", "AMP407"} & set(codes):
                count("missed")
                raise Wrong("wrong gradients, and neither AMP402 nor, of a buffer, AMP407")
        elif codes and not truth.overwritten:
            count("false")
            raise Wrong(f"the gradients are right, and {codes} is told")
        return
    expected = next((codes for said, codes in SAID.items() if said in str(plain.error)), None)
    if expected is None:
        count("other errors")
        return
    count("raised")
    named = [finding for finding in errors if finding.code in expected]
    if not named:
        count("missed")
        raise Wrong(f"{plain.error}: {codes} told, not one of {expected}")
    finding = named[0]
    # A write past the counter is a write too.
    aliases = re.findall(r"(\w+) = \w+\.data$", loaded.program.source, re.MULTILINE)
    uncounted = re.compile(rf"\.data\b|\b(?:{'|'.join(aliases)})\b" if aliases else r"\.data\b")
    past = {line for line, code in enumerate(loaded.program.source.splitlines(), 1) if uncounted.search(code)}
    if "AMP401" in expected:
        stale = truth.stale
        assert stale is not None, "the oracle has found nothing"
        writes = {line for line in truth.writes_since(stale) if plain.line is None or line <= plain.line}
        if finding.code == "AMP405" and not writes & loaded.program.stepping:
            raise Wrong("no optimizer has stepped")
        told = set(lines(loaded, finding, "write"))
        exactly = len(writes | past) <= 3 and finding.code == "AMP401"
        if not told or not told <= writes | past or (exactly and not told >= writes):
            count("missed" if not told else "false")
            raise Wrong(f"written in line {sorted(writes)}, told {sorted(told)}")
        if stale.line not in lines(loaded, finding, "save"):
            count("false")
            raise Wrong(f"saved in line {stale.line}, told {lines(loaded, finding, 'save')}")
        count("named to the line")
    elif "base or another view" in str(plain.error):
        # Raised where the view is used; the write came before.
        writes = {wrote.line for wrote in truth.wrote if wrote.after != wrote.before}
        told = lines(loaded, finding, "write")
        used = plain.line is None or plain.line in lines(loaded, finding, "call")
        if not used or not set(told) <= writes | past:
            count("false")
            raise Wrong(f"used in line {plain.line}, written in one of {sorted(writes)}, told {finding.sites}")
        count("named to the line" if told else "named without the write")
    elif finding.code in ("AMP403", "AMP404"):
        if lines(loaded, finding, "write")[:1] != [plain.line]:
            count("false")
            raise Wrong(f"written in line {plain.line}, told {finding.sites}")
        count("named to the line")


def check(program: Program, folder: Path, count: Callable[[str], None]) -> None:
    loaded = program.load(folder)
    try:
        plain = loaded.run(loaded.net())
        truth = loaded.truth()
        outcome, found = watched(loaded)
        count("programs")
        assert type(outcome.error) is type(plain.error)
        assert str(outcome.error) == str(plain.error)
        assert outcome.line == plain.line
        assert same_gradients(outcome.gradients, plain.gradients), "not bit-identical"
        assert same_gradients(outcome.state, plain.state), "not bit-identical"
        judge(loaded, plain, truth, found, count)
    except AssertionError as error:
        error.args = (f"{error}\n{program.source}",)
        raise
    finally:
        loaded.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


# Most programs write to nothing that matters.
@settings(max_examples=4 * settings.default.max_examples)
@given(program=programs())
def test_inplace_programs(program: Program, folder: Path, count: Callable[[str], None]) -> None:
    check(program, folder, count)
