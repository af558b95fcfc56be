"""Sharded models under a mixed precision policy, on hand-built traces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rules.traces import BF16, ERROR, INFO, SCALER, WARNING, call, calls, found, model, only, step, trace

from ampcheck.observe.walk import precision_by_policy
from ampcheck.precision import Precision
from ampcheck.trace import ModelInfo, Policy, StepTrace, Trace

LOW, FLOAT32 = "MixedPrecisionPolicy(param_dtype=torch.bfloat16)", "MixedPrecisionPolicy(param_dtype=torch.float32)"
ROOT = Policy("", "bfloat16", True, LOW)
HEAD = Policy("head", None, True, "MixedPrecisionPolicy(param_dtype=None)")
BY_POLICY = Precision("mixed", "cuda", "bfloat16", False, LOW, by="policy")


def sharded(*policies: Policy) -> ModelInfo:
    return dataclasses.replace(model(), policies=policies)


def ran(stem: str | None, head: str | None) -> StepTrace:
    """A step without autocast in which two modules computed with parameters of these dtypes."""
    own = {name: (dtype,) if dtype else () for name, dtype in (("stem", stem), ("head", head))}
    return StepTrace(calls=tuple(call(name, None, None, parameters=dtypes) for name, dtypes in own.items()))


def run(training: StepTrace, *policies: Policy, **facts: Any) -> Trace:
    default = {"precision": BY_POLICY, "scaler": None, "evaluation": None}
    return trace(model=sharded(*policies), training=training, **{**default, **facts})


PAIRS = (("AMP111", run(ran("bfloat16", "float32"), ROOT, HEAD), run(ran("bfloat16", "bfloat16"), ROOT, HEAD)),)


def test_policy_for_the_whole_model() -> None:
    assert found(run(ran("bfloat16", "bfloat16"), ROOT)) == {}


def test_module_sharded_without_the_policy() -> None:
    finding = only(run(ran("bfloat16", "float32"), ROOT, HEAD))
    assert (finding.code, finding.severity, finding.module) == ("AMP111", WARNING, "head")
    assert finding.message == (
        f"{LOW} was asked for on the model itself, but head computed with float32 parameters in 1 module call of the "
        "training step, because head is sharded without a policy; 1 call had bfloat16 parameters."
    )


def test_module_that_no_policy_covers() -> None:
    finding = only(run(ran("bfloat16", "float32"), Policy("stem", "bfloat16", True, LOW)))
    assert (finding.code, finding.module) == ("AMP111", "head")
    assert "which no policy covers" in finding.message


def test_float32_that_a_policy_names() -> None:
    assert found(run(ran("bfloat16", "float32"), ROOT, Policy("head", "float32", True, FLOAT32))) == {}


def test_autocast_beside_the_policy() -> None:
    regions = step("bfloat16")
    assert found(run(regions, ROOT)) == {}
    assert found(run(dataclasses.replace(regions, calls=calls("float16", 0)), ROOT))["AMP104"] is ERROR


@pytest.mark.parametrize("training", [None, ran("float16", "float16")], ids=["fit start", "watched"])
def test_float16_without_a_scaler(training: StepTrace | None) -> None:
    policy = Policy("", "float16", True, LOW)
    precision = dataclasses.replace(BY_POLICY, dtype="float16")
    assert only(run(training, policy, precision=precision)).code == "AMP301"
    scaled = dataclasses.replace(precision, scaler=True)
    assert found(run(training, policy, precision=scaled, scaler=SCALER)) == {}


def test_scaler_beside_a_bfloat16_policy() -> None:
    facts = {"precision": dataclasses.replace(BY_POLICY, scaler=True), "scaler": SCALER}
    assert found(run(ran("bfloat16", "bfloat16"), ROOT, **facts)) == {"AMP302": INFO}


def test_the_policy_is_what_was_asked_for_unless_the_host_asked_for_the_same() -> None:
    assert precision_by_policy(sharded(ROOT, HEAD), Precision(), scaler=False) == BY_POLICY
    float32 = Precision("true", "cuda", "float32", explicit=False)
    assert precision_by_policy(sharded(ROOT), float32, scaler=False) == BY_POLICY
    assert precision_by_policy(sharded(ROOT), BF16, scaler=False) is BF16
    assert precision_by_policy(sharded(HEAD), float32, scaler=False) is float32
