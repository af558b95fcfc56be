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

from ampcheck.observe.probes.aliases import AliasProbe
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.extension_ops import ExtensionOps
from ampcheck.observe.probes.graph import GraphProbe
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.probes.scaler import ScalerProbe

PROBES = (AliasProbe, AutocastProbe, ExtensionOps, GraphProbe, ModuleProbe, ScalerProbe, DispatchProbe)

# What torch, the user or Python call directly, and what contains the faults of all others: a line or two, no more.
CONTAINS = {
    "observe/probes/aliases-data_property.assign",
    "observe/probes/aliases-data_property.get",
    "observe/probes/aliases-method_listened_to.method",
    "observe/probes/aliases-AliasProbe._packing.packing",
    "observe/probes/aliases-AliasProbe._unpacking.unpacking",
    "observe/probes/aliases-_Alias.died",
    "observe/probes/graph-GraphProbe._failed",
    "observe/probes/autocast-AutocastProbe._did_enter",
    "observe/probes/autocast-AutocastProbe._will_leave",
    "observe/probes/autocast-_clearing.clear_autocast_cache",
    "observe/probes/containment-bare",
    "observe/probes/containment-contained.call",
    "observe/probes/containment-hide_frame",
    "observe/probes/containment-_OwnFrameHidden.__enter__",
    "observe/probes/containment-_OwnFrameHidden.__exit__",
    "observe/probes/scaler-ScalerProbe._will_clip",
    # What these raise Python ignores.
    "observe/probes/aliases-_Held.__del__",
    "observe/probes/graph_log-GraphLog.__del__",
    "observe/probes/extension_ops-ExtensionOps.__torch_function__",
    "observe/probes/dispatch-DispatchProbe.__torch_dispatch__",
    "observe/probes/extension_ops-ExtensionOps._apart",
    "observe/probes/known_ops-counting_versions",
    "checker-AmpChecker.training_step",
    "checker-AmpChecker.watching",
    "loops/watch-watch.__exit__",
    "loops/watch-watch._contained.call",
    "loops/watch-watch._let_go",
    "loops/watch-watch._safely",
    "loops/watch-watch._stepped",
    "observe/step-WatchedStep.__exit__",
    "observe/step-WatchedStep._remove",
    "observe/step-WatchedStep.abandon",
}
# What a fault costs there is a detail of a report, which is told without it.
DETAILS = (
    "checker-AmpChecker._replay.probes",
    "export/causes-",
    "export/compare-",
    "export/eager-",
    "export/graph-",
    "export/opened-",
    "export/runs-",
    "export/torchscript-",
    "export/values-",
    "failure/__init__-_message",
    "observe/again-Again.runs_with",
    "observe/edited-",
    "observe/probes/losses-",
    "observe/replay-",
    "observe/probes/aliases-_Alias.",
    "observe/probes/listening-_compilation",
    "observe/probes/listening-_swap_all",
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
HOLDS = ("observe/probes/", "checker", "run", "loops/", "observe/step", "observe/replay")


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
