"""A fault in any function of an adapter, in its real host: the run goes on to the bit, and one warning tells of it.

The run of a host is in ``run_<host>.py``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import HOSTS
from injection import Point, Program, Run, Tracer, run
from loops import same

# What contains the faults of all others, and what a host's own attribute is replaced by.
CONTAINS = (
    *("contained.call", "Session._guarded", "Session._training_step", "Session._evaluation_step"),
    "Session.fail",
)
# A fault there costs the replay alone, or is taken for the script's own.
DETAILS = (
    *("failing_batch", "_Fit.find_batch", "variables", "_instead", "_nothing"),
    *("_failing_batch", "_arguments_of_step", "_step_again", "_loss", "_alone", "_dtype_of_regions"),
)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Every record that is logged."""
    lines: list[str] = []
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        lines.append(made.getMessage())
        return made

    logging.setLogRecordFactory(record)
    yield lines
    logging.setLogRecordFactory(make)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def every_point(
    host: str, program: Program, contains: tuple[str, ...], said: list[str], done_before: set[Point]
) -> None:
    """Run ``program`` once for each function of the adapter that it reaches, and that is not among ``done_before``,
    with a fault in that function."""

    def told(arm: Any = contextlib.nullcontext, *, without: bool = False) -> Run:
        said.clear()
        done = run(lambda arm, told, models: program(arm, None if without else told, models), arm)
        done.told += said
        return done

    told(without=True)
    plain = told(without=True)
    # Each run ends in garbage collections: keep them to what the run has made.
    gc.collect()
    gc.freeze()
    tracer = Tracer()
    healthy = told(tracer)
    assert healthy.faults == []
    assert same(healthy.result, plain.result)
    ours = [point for point in tracer.points if point.file.endswith((f"{host}.py", "session.py"))]
    points = [point for point in ours if point.name not in CONTAINS + contains and point not in done_before]
    assert len(ours) > 5
    done_before.update(ours)
    wrong = []
    for point in points:
        tracer = Tracer(point)
        done = told(tracer)
        notes = " ".join(done.notes)
        problems = {
            "not fired": not tracer.fired,
            "another end": type(done.error) is not type(plain.error) or str(done.error) != str(plain.error),
            "not bit-identical": not same(done.result, plain.result),
            "left behind": done.left != {},
            "model kept": done.alive > plain.alive,
            "warnings": len(done.faults) != 1 and point.name not in DETAILS and "injected" not in notes,
        }
        found = [name for name, is_so in problems.items() if is_so]
        if found:
            wrong.append((str(point), found, repr(done.error), done.faults, [*done.left]))
    gc.unfreeze()
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", HOSTS)
def test_fault_in_the_adapter(host: str, said: list[str]) -> None:
    tests = importlib.import_module(f"run_{host}")
    done: set[Point] = set()
    for dies in (False, True):
        every_point(host, tests.run(dies), tests.CONTAINS, said, done)
