"""Every case: the crash really happens, is named for what it is, and each printed remedy makes it go away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import Case
from torch import nn

from ampcheck.rules.rule import Severity

if TYPE_CHECKING:
    from conftest import Recorder

FILES = ("autocast_argument", "dtype_crashes", "scaler_crashes", "reported")
CASES = [
    case
    for name in FILES
    for case in import_module(f"cases.{name}").CASES
    if case.family in ("autocast", "dtype", "scaler", "silent")
]
REMEDIES = [(case, remedy) for case in CASES for remedy in range(1, case.remedies + 1)]


def skip_without(case: Case) -> None:
    for package in case.needs:
        pytest.importorskip(package)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_names_what_went_wrong(case: Case, recorder: Recorder) -> None:
    skip_without(case)
    case.run(recorder)

    assert (recorder.error is not None) is case.crashes
    if not case.crashes and not recorder.watched:
        return
    found = recorder.found(case.code)
    assert len(found) == 1, recorder.trace.failure
    finding = found[0]
    assert finding.module == case.module
    for role, marker in case.marks.items():
        if role == "call" and not recorder.watched and finding.evidence["reason"] == "unknown":
            continue
        lines = {(site.file, site.line) for site in finding.sites if site.role == role}
        assert (case.file, case.line(marker)) in lines
    if case.reason is not None:
        # What only the watched step could tell is not guessed without it.
        allowed = {case.reason} if recorder.watched else {case.reason, "unknown"}
        assert finding.evidence["reason"] in allowed
    if case.operands is not None:
        assert {operand["name"]: operand["dtype"] for operand in finding.evidence["operands"]} == case.operands
    assert {key: finding.evidence.get(key) for key in case.evidence} == dict(case.evidence)
    errors = {one.code for one in recorder.findings if one.severity is Severity.ERROR}
    expected = {case.code, *case.also}
    assert errors <= expected
    if case.crashes and recorder.watched and case.code != "AMP102":
        assert errors == expected


@pytest.mark.parametrize(("case", "remedy"), REMEDIES, ids=lambda value: getattr(value, "id", value))
def test_each_printed_remedy_trains(case: Case, remedy: int, recorder: Recorder) -> None:
    skip_without(case)
    trained: list[bool] = []

    @contextmanager
    def guard(model: nn.Module, **options: Any) -> Iterator[None]:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with recorder(model, **options):
            yield
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        trained.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))

    case.run(guard, repaired=remedy)

    assert recorder.error is None
    assert trained == [case.trains]
    assert recorder.found(case.code) == []


@pytest.mark.parametrize("case", [case for case in CASES if case.code == "AMP203"], ids=lambda case: case.id)
def test_remedy_without_a_reason_is_one_of_those_with_it(case: Case, record: Callable[..., Recorder]) -> None:
    """Where the step was not watched and the reason is unknown, what is printed is a remedy that was shown to train."""
    skip_without(case)
    watched, unwatched = record(watched=True), record(watched=False)
    case.run(watched)
    case.run(unwatched)
    (told,), (guessed,) = watched.found(case.code), unwatched.found(case.code)
    if guessed.evidence["reason"] == "unknown":
        assert guessed.fix.rstrip(".").lower() in told.fix.lower()
    else:
        assert guessed.fix == told.fix
