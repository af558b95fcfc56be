"""AMP501 to AMP515 on hand-built traces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rules.traces import ERROR, INFO, WARNING, findings, found, site, step, trace

from ampcheck.trace import (
    Given,
    Gradients,
    LostConstant,
    NonFinite,
    OperandValues,
    OptimizerInfo,
    Origin,
    Outcome,
    Skips,
    StateNotFinite,
    Trace,
    Updates,
)

FINITE = {"float32": Outcome(True, 2.5), "bfloat16": Outcome(True, 2.5), "scale_1": Outcome(False)}
NOWHERE = {"float32": Outcome(False), "bfloat16": Outcome(False)}
BENIGN = NonFinite("gradient", 3, outcomes={"scale_1": Outcome(True, 2.5)})
OVERFLOW = Origin(
    "aten::bmm", "overflow", "forward", "float16", site(9), "attn", true_value=7.5e5, limit=65504.0, samples=(1,)
)


def failed(origin: Origin | None, outcomes: dict[str, Outcome] = FINITE, **more: Any) -> Trace:
    """A run in which the loss of step 7 was not finite."""
    facts: dict[str, Any] = {"root": "loss", "step": 7, "precision": "float16", "outcomes": outcomes} | more
    return trace(numbers=(NonFinite(origin=origin, **facts),))


def of(kind: str, op: str = "aten::div", **more: Any) -> Origin:
    return dataclasses.replace(OVERFLOW, kind=kind, op=op, true_value=None, limit=None, **more)


LOST = LostConstant(1e-8, 0.0, "float16", site(8))
BATCH = Given("input", "batch['x']")
MOVED = Updates("norm.weight", "norm", "bfloat16", 400, 2, 1e-3, 1e-3, 0, True)
UNMOVED = dataclasses.replace(MOVED, unmoved=400)
SMALL = Gradients(1000, 300, 600, 1e-9, 1e-5, 1.0)
NORMAL = dataclasses.replace(SMALL, subnormal=10, scale=65536.0)
PAIRS = (
    ("AMP501", failed(None), failed(OVERFLOW)),
    ("AMP502", failed(OVERFLOW), failed(of("singular"))),
    ("AMP503", failed(of("constant-lost", constant=LOST)), failed(of("singular"))),
    ("AMP504", failed(of("singular"), NOWHERE), failed(OVERFLOW)),
    ("AMP505", failed(of("masked", "aten::_softmax", fill=site(8)), NOWHERE), failed(of("masked"))),
    (
        "AMP506",
        trace(training=step(outputs={"attn": 40000.0, "head": 2.0})),
        trace(training=step(outputs={"attn": 400.0, "head": 2.0})),
    ),
    ("AMP507", trace(training=step(gradients=SMALL)), trace(training=step(gradients=NORMAL))),
    ("AMP508", trace(training=step(updates=(UNMOVED,))), trace(training=step(updates=(MOVED,)))),
    (
        "AMP509",
        trace(optimizers=(OptimizerInfo("AdamW", 3, 3, {"float16": 3}, eps_lost=((1e-8, "float16"),)),)),
        trace(optimizers=(OptimizerInfo("AdamW", 3, 3, {"float32": 3}),)),
    ),
    ("AMP510", failed(of("given", given=BATCH), NOWHERE), failed(of("given", given=Given("buffer", "scale")))),
    ("AMP511", trace(state=StateNotFinite(buffers=("bn.running_var",))), trace(state=StateNotFinite())),
    ("AMP512", trace(skips=Skips(40, 100, 65536.0, 1e-7)), trace(skips=Skips(2, 100, 65536.0, 16384.0))),
    ("AMP515", failed(OVERFLOW, NOWHERE), failed(OVERFLOW)),
)


def only(trace: Trace) -> Any:
    (finding,) = findings(trace)
    return finding


class TestLowPrecisionOverflow:
    def test_the_evidence(self):
        seen = only(failed(OVERFLOW))
        assert (seen.code, seen.severity, seen.module) == ("AMP502", ERROR, "attn")
        expected = {
            "op": "aten::bmm",
            "kind": "overflow",
            "phase": "forward",
            "dtype": "float16",
            "true_value": 7.5e5,
            "limit": 65504.0,
            "step": 7,
            "samples": [1],
            "finite_in": {"float32": True, "bfloat16": True, "scale_1": False},
        }
        assert {key: seen.evidence[key] for key in expected} == expected
        assert [(one.role, one.line) for one in seen.sites] == [(OVERFLOW.site.role, 9)]
        assert "its true value is 7.5e+05, and float16 ends at 6.55e+04" in seen.message
        assert "In float32 (loss 2.5) and in bfloat16 (loss 2.5) this batch is finite." in seen.message

    def test_bfloat16_is_offered_only_where_it_is_finite(self):
        assert "bfloat16" in only(failed(OVERFLOW)).fix
        assert "bfloat16" not in only(failed(OVERFLOW, FINITE | {"bfloat16": Outcome(False)})).fix

    def test_precision_is_acquitted_where_float32_fails_too(self):
        seen = next(one for one in findings(failed(OVERFLOW, NOWHERE)) if one.code == "AMP502")
        assert seen.message.startswith("Precision is not to blame")
        assert "learning rate" in seen.fix

    def test_a_gradient(self):
        seen = only(failed(dataclasses.replace(OVERFLOW, phase="backward"), root="gradient", parameters=("w",)))
        assert seen.message.startswith("The gradient of `bmm` overflowed float16")
        assert "the loss is finite, and its gradients are not (w first)" in seen.message

    def test_float32_overflows_too(self):
        seen = findings(failed(dataclasses.replace(OVERFLOW, dtype="float32", op="aten::mm"), NOWHERE))
        assert [one.code for one in seen] == ["AMP501", "AMP515"]
        assert "learning rate" in seen[0].fix

    def test_an_exponential_that_float32_cannot_hold(self):
        seen = only(failed(dataclasses.replace(OVERFLOW, dtype="float32", op="aten::exp"), NOWHERE))
        assert seen.code == "AMP504"
        assert "Bound its operand" in seen.fix


def test_only_the_scale_was_too_large():
    assert BENIGN.benign
    assert not failed(OVERFLOW).numbers[0].benign


def test_an_unknown_origin_says_why():
    seen = only(failed(None, {}, said="the failing batch was not replayed: memory ran out"))
    assert "the failing batch was not replayed: memory ran out, so its origin is not known" in seen.message
    assert seen.evidence["finite_in"] == {"float32": None, "bfloat16": None, "scale_1": None}


class TestSingularOperation:
    @pytest.mark.parametrize(
        ("op", "advice"),
        [
            ("aten::sqrt", "Keep its operand above 0"),
            ("aten::linalg_vector_norm", "under its root"),
            ("aten::log", "Keep its operand above 0"),
            ("aten::div", "divisor"),
            ("aten::acos", "inside (-1, 1)"),
        ],
    )
    def test_the_fix_is_the_ops(self, op, advice):
        assert advice in only(failed(of("singular", op), NOWHERE)).fix

    def test_an_operand_that_only_float16_makes_zero(self):
        assert "in float32" in only(failed(of("singular"))).fix

    def test_zeros_are_counted(self):
        zeros = OperandValues("float32", (4,), 1.0, 2)
        assert "2 elements of an operand are 0" in only(failed(of("singular", operands=(zeros,)), NOWHERE)).message


def test_the_fill_of_a_masked_row_is_a_site():
    seen = only(failed(of("masked", "aten::_softmax", fill=site(8)), NOWHERE))
    assert [one.line for one in seen.sites] == [8, 9]


def test_the_constant_and_its_line():
    seen = only(failed(of("constant-lost", constant=LOST)))
    assert "1e-08 is 0 in float16 at train.py:8" in seen.message
    assert seen.evidence["constant"] == {"value": 1e-8, "becomes": 0.0}


class TestUpdatesLost:
    def test_nearly_all_that_trains(self):
        assert found(trace(training=step(updates=(UNMOVED,)))) == {"AMP508": ERROR}

    def test_beside_what_moves(self):
        bias = dataclasses.replace(MOVED, parameter="norm.bias", unmoved=0)
        assert found(trace(training=step(updates=(UNMOVED, bias)))) == {"AMP508": WARNING}

    def test_an_optimizer_without_a_bound_may_move_them_later(self):
        assert found(trace(training=step(updates=(dataclasses.replace(UNMOVED, bounded=False),)))) == {
            "AMP508": WARNING
        }

    def test_a_learning_rate_that_warms_up(self):
        assert found(trace(training=step(updates=(dataclasses.replace(UNMOVED, would_move=400),)))) == {}


class TestSkippedSteps:
    def test_the_search_of_a_fresh_scaler(self):
        assert found(trace(skips=Skips(6, 40, 65536.0, 1024.0))) == {"AMP512": INFO}

    def test_many(self):
        seen = only(trace(skips=Skips(30, 100, 65536.0, 6e-5)))
        assert (seen.severity, seen.evidence["skipped"]) == (WARNING, 30)
        assert "skipped 30 of 100 optimizer steps; its scale went from 65536 to 6e-05" in seen.message

    def test_at_least(self):
        assert "at least 30 of 100" in only(trace(skips=Skips(30, 100, 65536.0, 6e-5, exact=False))).message

    @pytest.mark.parametrize("skips", [Skips(0, 100, 1.0, 1.0), Skips(1, 12, 65536.0, 32768.0), Skips(0, 0, 1.0, 1.0)])
    def test_few(self, skips):
        assert found(trace(skips=skips)) == {}


def test_statistics_of_batch_norm_can_be_set_back():
    seen = only(trace(state=StateNotFinite(buffers=("bn.running_var",), moment="at the end")))
    assert "reset_running_stats()" in seen.fix
    assert seen.message == "Not finite at the end: buffers bn.running_var."


def test_the_names_of_parameters():
    seen = only(
        trace(state=StateNotFinite(parameters=("head.weight",), averaged=("head.weight",), moment="at the end"))
    )
    assert "parameters head.weight; averaged weights head.weight" in seen.message


class TestLittleHeadroom:
    @pytest.mark.parametrize(("largest", "severity"), [(40000.0, WARNING), (10000.0, INFO)])
    def test_its_severity(self, largest, severity):
        assert found(trace(training=step(outputs={"attn": largest}))) == {"AMP506": severity}

    def test_the_bits(self):
        seen = only(trace(training=step(outputs={"attn": 16376.0, "head": 1.0})))
        assert (seen.module, seen.evidence["headroom_bits"]) == ("attn", {"attn": 2.0})


def test_the_window_of_usable_scales():
    seen = only(trace(training=step(gradients=SMALL)))
    assert seen.evidence["scales"] == [2.0**-14 / 1e-9, 65504.0 / 1e-5]
    assert "At the loss scale 1, 86 % of the gradients" in seen.message
