"""A plain script with DistributedDataParallel on three processes."""

from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple

import pytest
from launch import HERE, python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forks of one process")

PROGRAM = str(HERE / "data_parallel_steps.py")
RUN = ["-m", "ampcheck", "run", "--ignore", "AMP107"]
LAUNCHES = {
    "bare": [PROGRAM, "bare", "none"],
    "watched": [PROGRAM, "watch", "none"],
    "run": [*RUN, "--json", "report.json", PROGRAM, "bare", "none"],
    "float32": [PROGRAM, "watch", "float32"],
    "float16": [PROGRAM, "watch", "float16"],
    "dies": [PROGRAM, "watch", "dtype"],
    "fails": [*RUN, "--fail-on", "warning", PROGRAM, "bare", "float16"],
}


class Ranks(NamedTuple):
    """Of each rank of a launch: exit status, standard output, standard error; and the findings of the report."""

    statuses: list[int]
    out: list[str]
    err: list[str]
    findings: list[Any] | None


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    directory = tmp_path_factory.mktemp("launches")
    done = python(str(HERE / "ranks.py"), "3", json.dumps(LAUNCHES), cwd=directory)
    assert done.returncode == 0, done.stderr

    def told(name: str, statuses: list[int]) -> Ranks:
        out, err = ([(directory / name / f"{s}.{rank}").read_text() for rank in range(3)] for s in ("out", "err"))
        report = directory / name / "report.json"
        return Ranks(statuses, out, err, json.loads(report.read_text())["findings"] if report.exists() else None)

    return {name: told(name, statuses) for name, statuses in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", ["watched", "run"])
def test_three_ranks_give_one_report_and_nothing_is_added(launches: dict[str, Ranks], name: str) -> None:
    bare, checked = launches["bare"], launches[name]
    assert checked.statuses == [0, 0, 0], checked.err
    # The last loss to the bit, and the number of collectives.
    assert all(re.fullmatch(r"rank \d loss \S+ collectives [1-9]\d*\n", line) for line in bare.out)
    assert checked.out == bare.out
    assert checked.err[0].count("ampcheck  mixed bfloat16 on cpu") == 1
    assert checked.err[0].count("ampcheck  watched training step") == 1
    assert "ampcheck" not in "".join(checked.err[1:])
    assert (bare.findings, checked.findings) == (None, [])


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("float32", "AMP101", "Mixed bfloat16 was asked for"), ("float16", "AMP104", "ran under autocast float16")],
)
def test_a_finding_of_some_ranks_names_them(launches: dict[str, Ranks], name: str, code: str, words: str) -> None:
    ranks = launches[name]
    assert ranks.statuses == [0, 0, 0], ranks.err
    assert "".join(ranks.err).count(f"error[{code}]") == ranks.err[0].count(f"error[{code}]") == 1
    assert ranks.findings is not None
    finding = ranks.findings[0]
    assert (finding["code"], words in finding["message"]) == (code, True)
    assert finding["message"].endswith("(seen on ranks 1, 2 only)")


def test_a_rank_that_dies_is_explained_and_hangs_no_other(launches: dict[str, Ranks]) -> None:
    ranks = launches["dies"]
    assert ranks.statuses[1] == 1
    assert -9 not in ranks.statuses
    assert "expected m1 and m2 to have the same dtype" in ranks.err[1] or "must have the same dtype" in ranks.err[1]
    assert ranks.err[1].count("error[AMP203]") == 1
    assert "AMP203" not in ranks.err[0] + ranks.err[2]


def test_fail_on_ends_each_rank_with_its_status(launches: dict[str, Ranks]) -> None:
    ranks = launches["fails"]
    assert ranks.statuses == [3, 3, 3], ranks.err
    assert ranks.out == ["", "", ""]
    assert all("stopped by --fail-on: warning[AMP301]" in err for err in ranks.err)
    assert "(seen on ranks 1, 2 only)" in ranks.err[0]
