"""AMP301 to AMP311 and AMP900 on hand-built traces."""

from __future__ import annotations

import dataclasses

import pytest
from rules.traces import BF16, ERROR, FP16, INFO, NET, WARNING, call, findings, found, model, only, site, step, trace

from ampcheck.precision import Precision
from ampcheck.trace import Collapse, OptimizerInfo, ScalerCall, ScalerInfo, Trace

UNDECLARED = Precision()
DISABLED = ScalerInfo("GradScaler", False, "cuda")
BRAIN = dict.fromkeys(NET, "bfloat16")
UNSCALED = dataclasses.replace(FP16, scaler=False)
OTHERS = OptimizerInfo("SGD", 3, 0, {"float32": 3})


def of_scaler(op: str, line: int, *optimizers: int, scaled: bool | None = None, skipped: bool | None = None):
    return ScalerCall(op, site(line), optimizers, scaled, skipped)


SCALE = of_scaler("scale", 10)
BACKWARD = of_scaler("backward", 10, scaled=True)
UNSCALE = of_scaler("unscale", 11, 0)
CLIP = of_scaler("clip", 12, 0, scaled=False)
CLIP_SCALED = of_scaler("clip", 12, 0, scaled=True)
STEP = of_scaler("step", 13, 0, skipped=False)
SKIPPED = of_scaler("step", 13, 0, skipped=True)
UPDATE = of_scaler("update", 14)
BACKWARD_UNSCALED = of_scaler("backward", 9, 0, scaled=False)


def scaling(*calls: ScalerCall) -> Trace:
    """A healthy run with these calls in its watched steps."""
    return trace(training=step(scaling=calls))


PAIRS = (
    ("AMP301", trace(precision=UNSCALED, scaler=None), trace()),
    ("AMP302", trace(precision=BF16, training=step("bfloat16"), evaluation=None), trace(evaluation=None)),
    (
        "AMP305",
        scaling(SCALE, BACKWARD, CLIP_SCALED, STEP, UPDATE),
        scaling(SCALE, BACKWARD, UNSCALE, CLIP, STEP, UPDATE),
    ),
    ("AMP307", scaling(*(SCALE, BACKWARD, SKIPPED, UPDATE) * 3), scaling(SCALE, BACKWARD, SKIPPED, STEP, STEP)),
    (
        "AMP307",
        trace(training=step(scaling=(SCALE, BACKWARD, SKIPPED, UPDATE) * 3, collapse=Collapse(0.5, True))),
        trace(training=step(scaling=(SCALE, BACKWARD, SKIPPED, UPDATE) * 3, collapse=Collapse(8192.0, True))),
    ),
    ("AMP309", trace(optimizers=(OTHERS,)), trace()),
    ("AMP310", scaling(SCALE, BACKWARD, SKIPPED, UPDATE), scaling(SCALE, BACKWARD, STEP, UPDATE)),
    ("AMP311", scaling(BACKWARD_UNSCALED, STEP, UPDATE), scaling(SCALE, BACKWARD, STEP, UPDATE)),
    ("AMP900", Trace(internal_error="ValueError: no such thing"), trace()),
)


class TestMissingGradScaler:
    @pytest.mark.parametrize("scaler", [None, DISABLED], ids=["none", "disabled"])
    def test_float16(self, scaler):
        seen = only(trace(precision=UNSCALED, scaler=scaler))
        assert (seen.code, seen.severity) == ("AMP301", WARNING)
        # What is said at fit start is not said again after the watched step.
        assert only(trace(precision=UNSCALED, scaler=scaler, training=None, evaluation=None)) == seen

    def test_undeclared(self):
        finding = only(trace(precision=UNDECLARED, scaler=None))
        assert finding.message == (
            "3 module calls of the training step ran under autocast float16, with no gradient scaler."
        )

    def test_enabled(self):
        assert found(trace()) == {}

    def test_bfloat16(self):
        assert found(trace(precision=BF16, scaler=None, training=step("bfloat16"), evaluation=None)) == {}

    def test_float16_that_the_host_replaces(self):
        precision = dataclasses.replace(UNSCALED, effective_dtype="bfloat16")
        assert found(trace(precision=precision, scaler=None, training=None)) == {}

    def test_scaling_inside_the_host(self):
        assert found(trace(scaler=None)) == {}

    def test_float16_that_never_came_into_force(self):
        training = step(None)
        assert found(trace(precision=UNSCALED, scaler=None, training=training, evaluation=None)) == {"AMP101": ERROR}


class TestNeedlessGradScaler:
    def test_bfloat16(self):
        seen = only(trace(precision=BF16, training=step("bfloat16"), evaluation=None))
        assert (seen.code, seen.severity) == ("AMP302", INFO)
        assert seen.message == "The GradScaler is enabled, but mixed bfloat16 needs no loss scaling."
        assert only(trace(precision=BF16, training=None, evaluation=None)) == seen

    def test_undeclared_bfloat16(self):
        assert found(trace(precision=UNDECLARED, training=step("bfloat16"), evaluation=None)) == {"AMP302": INFO}

    def test_float32(self):
        precision = Precision("true", "cuda", "float32")
        assert found(trace(precision=precision, training=step(None), evaluation=None)) == {"AMP302": INFO}

    def test_partly_float16(self):
        mixed = call("stem", "bfloat16"), call("head", "float16")
        assert found(trace(precision=UNDECLARED, training=step(calls=mixed), evaluation=None)) == {}

    @pytest.mark.parametrize("scaler", [None, DISABLED], ids=["none", "disabled"])
    def test_no_scaler(self, scaler):
        assert found(trace(precision=BF16, scaler=scaler, training=step("bfloat16"), evaluation=None)) == {}

    def test_bfloat16_parameters_on_cuda_crash(self):
        facts = {"precision": BF16, "training": step("bfloat16"), "evaluation": None}
        held = (OptimizerInfo("AdamW", 3, 3, {"bfloat16": 3}),)
        assert found(trace(model=model(BRAIN), optimizers=held, **facts)) == {"AMP302": ERROR, "AMP201": WARNING}
        cpu = model(BRAIN, device_type="cpu")
        assert found(trace(model=cpu, optimizers=held, **facts))["AMP302"] == INFO
        others = (OptimizerInfo("AdamW", 3, 3, {"float32": 3}),)
        assert found(trace(model=model(BRAIN), optimizers=others, **facts))["AMP302"] == INFO


class TestOptimizerHoldsOtherParameters:
    def test_none_is_the_models(self):
        finding = only(trace(optimizers=(OTHERS,)))
        assert (finding.code, finding.severity) == ("AMP309", ERROR)
        assert finding.message == (
            "No optimizer holds any of the 3 trainable parameters of the model: there is SGD with 3 parameters, "
            "none of them the model's."
        )

    def test_one_of_several_optimizers_holds_some(self):
        assert found(trace(optimizers=(OTHERS, OptimizerInfo("SGD", 3, 1, {"float32": 3})))) == {}

    @pytest.mark.parametrize(
        "optimizers", [(), (OptimizerInfo("SGD", 0, 0),)], ids=["no optimizer", "optimizer without parameters"]
    )
    def test_nothing_is_held(self, optimizers):
        assert found(trace(optimizers=optimizers)) == {}

    def test_nothing_to_train(self):
        assert found(trace(model=model(frozen=tuple(NET)), optimizers=(OTHERS,))) == {}

    def test_float32_copies_of_low_precision_weights(self):
        precision = Precision("true", "cuda", "bfloat16")
        facts = {"precision": precision, "scaler": None, "training": step(None), "evaluation": None}
        assert found(trace(model=model(BRAIN), optimizers=(OTHERS,), **facts)) == {}


class TestClipBeforeUnscale:
    def test_clipped_while_scaled(self):
        finding = only(scaling(SCALE, BACKWARD, CLIP_SCALED, STEP, UPDATE))
        assert (finding.code, finding.severity) == ("AMP305", WARNING)
        assert (
            finding.message
            == "Gradients were clipped at train.py:12 while they were still multiplied by the loss scale."
        )
        assert finding.sites == (site(12), site(10))
        assert finding.evidence == {"reason": "no-unscale-before-clip"}

    def test_unscaled_before(self):
        assert found(scaling(SCALE, BACKWARD, UNSCALE, CLIP, STEP, UPDATE)) == {}

    def test_not_to_be_told(self):
        assert found(scaling(SCALE, BACKWARD, of_scaler("clip", 12, 0), STEP, UPDATE)) == {}

    @pytest.mark.parametrize(
        "calls",
        [(CLIP_SCALED,), (STEP, CLIP_SCALED), (CLIP_SCALED, of_scaler("step", 13, 1)), (CLIP_SCALED, UNSCALE)],
        ids=["no step", "step before it", "step of another optimizer", "no step, but unscaled"],
    )
    def test_clipped_gradients_that_no_step_uses(self, calls):
        assert found(scaling(SCALE, BACKWARD, *calls)) == {}

    def test_one_line_in_every_step_is_one_finding(self):
        once = SCALE, BACKWARD, CLIP_SCALED, STEP, UPDATE
        assert found(scaling(*once, *once)) == {"AMP305": WARNING}

    def test_the_last_scaled_backward_is_named(self):
        backward = of_scaler("backward", 8, scaled=True), of_scaler("backward", 9, scaled=True)
        without = of_scaler("backward", 11, 1, scaled=False)
        assert only(scaling(*backward, without, CLIP_SCALED, STEP, BACKWARD)).sites == (site(12), site(9))
        assert only(scaling(CLIP_SCALED, STEP)).sites == (site(12),)

    def test_clipped_twice(self):
        seen = findings(scaling(BACKWARD, of_scaler("clip", 11, 0, scaled=True), CLIP_SCALED, STEP))
        assert [finding.sites for finding in seen] == [(site(11), site(10)), (site(12), site(10))]


class TestLossScaleCollapse:
    def test_every_step_skipped(self):
        seen = findings(scaling(*(SCALE, BACKWARD, SKIPPED, UPDATE) * 3))
        # The first step was skipped, too: that is information beside it.
        assert [(finding.code, finding.severity) for finding in seen] == [("AMP307", WARNING), ("AMP310", INFO)]
        assert seen[0].message == ("The scaler skipped all 3 watched optimizer steps, and lowered its scale each time.")
        assert seen[0].sites == (site(13),)
        assert seen[0].evidence == {"steps": 3, "skipped": 3}

    def test_beside_an_optimizer_that_decides_itself(self):
        fused, later = of_scaler("step", 15, 1), of_scaler("step", 16, 0, skipped=True)
        seen = findings(scaling(fused, SKIPPED, fused, later, fused, later))
        assert [(finding.code, finding.sites, finding.evidence["steps"]) for finding in seen] == [
            ("AMP307", (site(13),), 3)
        ]

    @pytest.mark.parametrize(
        "steps",
        [(SKIPPED, SKIPPED), (SKIPPED, SKIPPED, SKIPPED, STEP), (SKIPPED, SKIPPED, of_scaler("step", 13, 0))],
        ids=["two at the start", "all but one", "one unknown"],
    )
    def test_some_steps_skipped(self, steps):
        assert found(scaling(*steps)) == {"AMP310": INFO}


class TestFirstStepSkipped:
    def test_in_the_watched_step(self):
        finding = only(scaling(SCALE, BACKWARD, SKIPPED, UPDATE))
        assert (finding.code, finding.severity) == ("AMP310", INFO)
        assert finding.message == (
            "The scaler skipped the first optimizer step at train.py:13: gradients overflowed at the initial loss "
            "scale."
        )
        assert finding.sites == (site(13),)
        assert finding.evidence == {"skipped": True}

    @pytest.mark.parametrize("first", [STEP, of_scaler("step", 13, 0)], ids=["taken", "unknown"])
    def test_a_later_step_skipped(self, first):
        assert found(scaling(first, SKIPPED)) == {}


class TestUnscaledBackward:
    def test_stepped_by_the_scaler(self):
        finding = only(scaling(BACKWARD_UNSCALED, STEP, UPDATE))
        assert (finding.code, finding.severity) == ("AMP311", WARNING)
        assert finding.message == (
            "The loss backpropagated at train.py:9 was not scaled, but the scaler divides its gradients by the loss "
            "scale at train.py:13."
        )
        assert finding.sites == (site(9), site(13))
        assert finding.evidence == {"reason": "never-scaled"}

    def test_unscaled_by_the_scaler(self):
        assert only(scaling(BACKWARD_UNSCALED, UNSCALE, STEP)).sites == (site(9), site(11))

    def test_scaled(self):
        assert found(scaling(SCALE, BACKWARD, STEP, UPDATE)) == {}

    def test_unknown_whether_scaled(self):
        assert found(scaling(of_scaler("backward", 9, 0), STEP)) == {}

    @pytest.mark.parametrize(
        "calls",
        [(SCALE, BACKWARD_UNSCALED), (STEP, BACKWARD_UNSCALED), (BACKWARD_UNSCALED, of_scaler("step", 13, 1))],
        ids=["no step", "step before it", "step of another optimizer"],
    )
    def test_gradients_that_the_scaler_does_not_divide(self, calls):
        assert found(scaling(*calls)) == {}

    def test_one_line_in_every_step_is_one_finding(self):
        once = BACKWARD_UNSCALED, STEP, UPDATE
        assert found(scaling(*once, *once)) == {"AMP311": WARNING}

    def test_the_step_of_its_own_optimizer_is_named(self):
        steps = of_scaler("step", 12, 1, skipped=False), STEP
        assert only(scaling(BACKWARD_UNSCALED, *steps)).sites == (site(9), site(13))


class TestInternalError:
    def test_switched_off(self):
        (finding,) = findings(Trace(internal_error="ValueError: no such thing"))
        assert (finding.code, finding.severity) == ("AMP900", WARNING)
        assert finding.message == (
            "AmpCheck switched itself off, and training goes on unchecked: ValueError: no such thing."
        )
        assert finding.evidence == {"exception": "ValueError: no such thing"}

    def test_at_work(self):
        assert findings(Trace()) == []
