"""A fault in any function of AmpCheck: training goes on to the bit, one warning tells of it, and nothing is left.

What only computes is reached through few callers: of each such file the first function that runs stands for all.
``AMPCHECK_FAULTS=all`` takes every function.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator

import pytest
from injection import Point, Run, Tracer, run
from loops import same
from programs import PROGRAMS

from ampcheck.probes.aliases import AliasProbe
from ampcheck.probes.autocast import AutocastProbe
from ampcheck.probes.graph import GraphProbe
from ampcheck.probes.modules import ModuleProbe
from ampcheck.probes.scaler import ScalerProbe
from ampcheck.probes.writes import ExtensionOps, WriteProbe

PROBES = (AliasProbe, AutocastProbe, ExtensionOps, GraphProbe, ModuleProbe, ScalerProbe, WriteProbe)

# What torch, the user or Python call directly, and what contains the faults of all others: a line or two, no more.
CONTAINS = {
    "probes/aliases-data_property.assign",
    "probes/aliases-data_property.get",
    "probes/aliases-_method.method",
    "probes/aliases-AliasProbe._packing.packing",
    "probes/aliases-AliasProbe._unpacking.unpacking",
    "probes/aliases-_Alias.died",
    "probes/graph-GraphProbe._failed",
    "probes/autocast-AutocastProbe._did_enter",
    "probes/autocast-AutocastProbe._will_leave",
    "probes/autocast-_clearing.clear_autocast_cache",
    "probes/containment-bare",
    "probes/containment-contained.call",
    "probes/containment-hide_frame",
    "probes/scaler-ScalerProbe._will_clip",
    # What these raise Python ignores.
    "probes/aliases-_Held.__del__",
    "probes/log-GraphLog.__del__",
    "probes/writes-ExtensionOps.__torch_function__",
    "probes/writes-WriteProbe.__torch_dispatch__",
    "probes/writes-WriteProbe.apart",
    "probes/writes-_counting",
    "core/checker-AmpChecker.training_step",
    "core/checker-AmpChecker.watching",
    "core/plain-watch.__exit__",
    "core/plain-watch._contained.call",
    "core/plain-watch._let_go",
    "core/plain-watch._safely",
    "core/plain-watch._stepped",
    "core/step-WatchedStep.__exit__",
    "core/step-WatchedStep._remove",
    "core/step-WatchedStep.abandon",
}
# What a fault costs there is a detail of a report, which is told without it.
DETAILS = (
    "core/checker-AmpChecker._replay.probes",
    "failure/__init__-_message",
    "core/replay-",
    "probes/aliases-_Alias.",
    "probes/listening-_compilation",
    "probes/listening-_swap_all",
)


@functools.cache
def plain(program: str) -> Run:
    return run(lambda arm, told, models: PROGRAMS[program](arm, None, models))


@functools.cache
def points() -> dict[Point, str]:
    """Every function that runs, with the first program in which it does."""
    found: dict[Point, str] = {}
    for name, program in PROGRAMS.items():
        tracer = Tracer()
        run(program, tracer)
        for point in tracer.points:
            found.setdefault(point, name)
    return found


EVERY = os.environ.get("AMPCHECK_FAULTS") == "all"
# What holds hooks, modes and wrappers, or calls what does.
HOLDS = ("probes/", "core/checker", "core/plain", "core/step", "core/replay")


def chosen() -> Iterator[tuple[Point, str]]:
    files = set()
    for point, program in points().items():
        if str(point) not in CONTAINS and (EVERY or point.file.startswith(HOLDS) or point.file not in files):
            files.add(point.file)
            yield point, program


POINTS = list(chosen())
# There PyTorch's own region is half left, Python ignores what is raised, or Dynamo takes it for its own.
HALF = (
    "AutocastProbe._cleared",
    "_Alias.died",
    "_Alias.written",
    "_compilation_began",
    "_compilation_ended",
    "_swap_all",
)
INTERRUPTED = [
    (point, program)
    for point, program in POINTS
    if (EVERY or point.file.startswith(HOLDS)) and not str(point).endswith(HALF)
]


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Each run ends in a garbage collection: keep it to what the run has made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def assert_unharmed(done: Run, program: str) -> None:
    __tracebackhide__ = True
    expected = plain(program)
    assert type(done.error) is type(expected.error), repr(done.error)
    assert str(done.error) == str(expected.error)
    assert done.frames == expected.frames
    assert same(done.result, expected.result)
    assert same(done.random, expected.random)
    assert done.left == {}
    assert done.alive == 0


@pytest.mark.parametrize(("point", "program"), POINTS, ids=[str(point) for point, _ in POINTS])
def test_fault(point: Point, program: str) -> None:
    tracer = Tracer(point)
    done = run(PROGRAMS[program], tracer)
    assert tracer.fired
    assert_unharmed(done, program)
    if str(point).startswith(DETAILS):
        assert len(done.faults) <= 1
    else:
        (warning,) = done.faults
        assert "injected" in warning


@pytest.mark.parametrize(("point", "program"), INTERRUPTED, ids=[str(point) for point, _ in INTERRUPTED])
def test_interrupt(point: Point, program: str) -> None:
    """Ctrl-C may come at any moment, and is the user's."""
    tracer = Tracer(point, KeyboardInterrupt)
    done = run(PROGRAMS[program], tracer)
    assert tracer.fired
    assert type(done.error) is KeyboardInterrupt
    assert done.left == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_is_harmed_without_a_fault(program: str) -> None:
    done = run(PROGRAMS[program])
    assert_unharmed(done, program)
    assert done.faults == []
