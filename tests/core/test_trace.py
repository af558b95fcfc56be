"""Facts of a run: plain data, of which two watched steps make one."""

from __future__ import annotations

import dataclasses
import pickle

from ampcheck.trace import AutocastRegion, AutocastState, ModuleCall, StepTrace


def region(index: int, outer: int | None = None) -> AutocastRegion:
    return AutocastRegion(index, "cpu", "bfloat16", True, True, True, None, outer=outer)


def call(module: str, region: int | None) -> ModuleCall:
    return ModuleCall(module, "Linear", AutocastState("cpu", True, "bfloat16"), region, True, False, (), ())


def test_two_steps_as_one():
    earlier = StepTrace(calls=(call("a", 0), call("b", None)), regions=(region(0),), died_of="x", complete=False)
    later = StepTrace(calls=(call("a", 1),), regions=(region(0), region(1, outer=0)), cache_cleared=True)
    both = earlier.followed_by(later)
    assert both.steps == 2
    assert [one.region for one in both.calls] == [0, None, 2]
    assert [(one.index, one.outer) for one in both.regions] == [(0, None), (1, None), (2, 1)]
    assert [one.index for one in both.around(2)] == [2, 1]
    assert (both.cache_cleared, both.complete, both.died_of) == (True, False, None)


def test_every_fact_says_what_two_steps_make_of_it():
    assert all("merge" in fact.metadata for fact in dataclasses.fields(StepTrace))


def test_a_step_can_be_sent():
    step = StepTrace(calls=(call("a", 0),), regions=(region(0),))
    assert pickle.loads(pickle.dumps(step)) == step
