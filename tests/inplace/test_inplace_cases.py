"""Every case: the write line, the save line, the module and the code; and the repaired twin gives nothing."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import Case
from inplace.conftest import Recorder

FILES = ("inplace_saved", "inplace_silent", "inplace_kin", "inplace_timm", "reported")
CASES = [
    case for name in FILES for case in import_module(f"cases.{name}").CASES if case.family in ("in-place", "autograd")
]
REMEDIES = [(case, remedy) for case in CASES for remedy in range(1, case.remedies + 1)]

# Older PyTorch does not tell which saved-tensor hooks are active.
HOOKS_ARE_TOLD = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def skip_without(case: Case) -> None:
    for package in case.needs:
        pytest.importorskip(package)
    if not case.fails():
        pytest.skip("it does not fail on this PyTorch")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_names_write_save_and_module(case: Case, recorder: Recorder) -> None:
    skip_without(case)
    case.run(recorder)

    assert (recorder.error is not None) is case.crashes
    expected = [code for code in (case.code, *case.also) if code != "AMP409" or HOOKS_ARE_TOLD]
    assert [finding.code for finding in recorder.findings] == expected
    if not expected:
        return
    finding = recorder.findings[0]
    for role, marker in case.marks.items():
        lines = {site.line for site in finding.sites if site.role == role and site.file == case.file}
        assert lines == {case.line(marker)}, (role, finding)
    assert finding.module == case.module
    assert {key: finding.evidence.get(key) for key in case.evidence} == dict(case.evidence)
    assert finding.fix


@pytest.mark.parametrize(("case", "remedy"), REMEDIES, ids=lambda value: getattr(value, "id", value))
def test_the_remedy_leaves_nothing_to_say(case: Case, remedy: int, recorder: Recorder) -> None:
    skip_without(case)
    case.run(recorder, repaired=remedy)

    assert recorder.error is None
    assert recorder.findings == []
