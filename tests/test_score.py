"""The score command: every case of the project's own is right, a wrong one is said and fails it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import score
from cases import Case
from cases.dtype_crashes import distance_in_half

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# The others have tests that ask for more.
FILES = ("misconfigured", "exports", "later")
CASES = [case for name in FILES for case in import_module(f"cases.{name}").CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case_is_right(case: Case) -> None:
    why = score.left_out(case)
    if why:
        pytest.skip(why)
    entry = score.score(case)
    assert entry["wrong"] == {}
    assert all(entry["ampcheck"].values())


def test_ids_are_unique() -> None:
    ids = [case.id for name in score.PLAIN for case in import_module(f"cases.{name}").CASES]
    assert len(ids) == len(set(ids))


def test_wrong_expectations_are_told() -> None:
    """Each role can be wrong."""
    expected = {"code": "AMP207", "module": "matcher", "operands": {"boxes": "float16", "targets": "float16"}}

    def wrong(**other: object) -> dict[str, str]:
        return score.wrong(Case("distance-in-half", distance_in_half, family="dtype", **{**expected, **other}))

    assert wrong() == {}
    assert wrong(module="head") == {"module": "'matcher'"}
    assert set(wrong(operands={"boxes": "bfloat16"})) == {"reason"}
    assert set(wrong(code="AMP203")) == {"code", "module", "raise line", "reason"}
    with pytest.raises(AssertionError, match="crashes"):
        wrong(crashes=False)


def test_remedy_that_does_not_work_is_told() -> None:
    def fails(guard: object, repaired: int) -> None:
        distance_in_half(guard, 0)

    case = Case("distance-in-half", fails, "AMP207", "dtype")
    assert re.match(r"remedy 1 raises (NotImplementedError|RuntimeError)", score.fails_again(case))


def test_host_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "cases.hosts_lightning", raising=False)
    assert score.run_file("hosts_lightning", ()) == {
        "hosts_lightning": {"left_out": "lightning.pytorch is not installed"}
    }


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "score.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_command(tmp_path: Path) -> None:
    table = tmp_path / "score.json"
    files = ("--file", "inplace_kin", "--file", "dtype_crashes")
    ran = run(*files, "--json", str(table), "column-of-a-weight", "distance-in-half")
    assert ran.returncode == 0, ran.stderr
    assert "2 cases" in ran.stdout
    assert "not right" not in ran.stdout
    cases = json.loads(table.read_text())["cases"]
    assert cases["column-of-a-weight"]["ampcheck"] == {"code": True, "write line": True, "fix": True}
    assert cases["distance-in-half"]["pytorch"] == {"module": False, "raise line": True}


def test_command_fails_where_a_case_is_not_right(tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['score.py', '--file', 'inplace_kin', 'column-of-a-weight']\n"
        f"sys.path[:0] = [{str(BENCHMARKS)!r}]\n"
        "import dataclasses, score\nfrom cases import inplace_kin\n"
        "cases = inplace_kin.CASES\n"
        "cases[:] = [dataclasses.replace(one, module='elsewhere') for one in cases]\n"
        "sys.exit(score.main())\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 1, ran.stderr
    assert "not right: column-of-a-weight: module: None" in ran.stdout
