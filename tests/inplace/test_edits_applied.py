"""Every remedy that is a line, written into the program as it stands: the program then runs, and nothing is found."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from cases import Case, Cases
from inplace.conftest import Recorder
from inplace.test_inplace_cases import CASES, HOOKS_ARE_TOLD, skip_without

from ampcheck.rules.rule import Edit

# What else than the line that wrote has to change is said in words.
IN_WORDS = {"numpy-array", "function-without-mark-dirty", "column-of-a-weight", "sinusoids-written-into-an-embedding"}


def rewritten(edit: Edit) -> str:
    lines = Path(edit.file).read_text(encoding="utf-8").splitlines(keepends=True)
    stands = lines[edit.line - 1]
    assert edit.before in stands
    indent = stands[: len(stands) - len(stands.lstrip())]
    lines[edit.line - 1] = "".join(f"{indent}{one}\n" for one in edit.after.split("\n"))
    return "".join(lines)


def edited_case(case: Case, edit: Edit, folder: Path) -> Case:
    """The same case in the file as edited."""
    file = folder / f"edited_{Path(edit.file).stem}.py"
    file.write_text(rewritten(edit), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"cases.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    cases: Cases = module.CASES
    return next(one for one in cases if one.id == case.id)


@pytest.mark.parametrize("case", [case for case in CASES if case.code], ids=lambda case: case.id)
def test_the_edit_trains(case: Case, recorder: Recorder, tmp_path: Path) -> None:
    skip_without(case)
    if case.code == "AMP409" and not HOOKS_ARE_TOLD:
        pytest.skip("this PyTorch does not tell which hooks are active")
    case.run(recorder)
    finding = recorder.findings[0]
    edit = finding.edit
    if edit is None:
        assert case.id in IN_WORDS or finding.code not in ("AMP401", "AMP402", "AMP404")
        return
    if edit.file != case.file:
        assert Path(edit.file).parent == Path(case.file).parent
        return
    again = Recorder()
    edited_case(case, edit, tmp_path).run(again)
    assert again.error is None, edit
    assert [one for one in again.findings if one.code == finding.code] == [], edit
