"""AMP301 to AMP309 and AMP900 on hand-built traces."""

from __future__ import annotations

import dataclasses

import pytest
from rules.traces import BF16, ERROR, FP16, INFO, NET, WARNING, call, findings, found, model, only, step, trace

from ampcheck.precision import Precision
from ampcheck.trace import OptimizerInfo, ScalerInfo, Trace

UNDECLARED = Precision()
DISABLED = ScalerInfo("GradScaler", False, "cuda")
BRAIN = dict.fromkeys(NET, "bfloat16")


class TestMissingGradScaler:
    UNSCALED = dataclasses.replace(FP16, scaler=False)

    @pytest.mark.parametrize("scaler", [None, DISABLED], ids=["none", "disabled"])
    def test_float16(self, scaler):
        seen = only(trace(precision=self.UNSCALED, scaler=scaler))
        assert (seen.code, seen.severity) == ("AMP301", WARNING)
        # What is said at fit start is not said again after the watched step.
        assert only(trace(precision=self.UNSCALED, scaler=scaler, training=None, evaluation=None)) == seen

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
        precision = dataclasses.replace(self.UNSCALED, effective_dtype="bfloat16")
        assert found(trace(precision=precision, scaler=None, training=None)) == {}

    def test_scaling_inside_the_host(self):
        assert found(trace(scaler=None)) == {}

    def test_float16_that_never_came_into_force(self):
        training = step(None)
        assert found(trace(precision=self.UNSCALED, scaler=None, training=training, evaluation=None)) == {
            "AMP101": ERROR
        }


class TestNeedlessGradScaler:
    def test_bfloat16(self):
        seen = only(trace(precision=BF16, training=step("bfloat16"), evaluation=None))
        assert (seen.code, seen.severity) == ("AMP302", INFO)
        assert seen.message == "The GradScaler is enabled, and mixed bfloat16 needs no loss scaling."
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
    OTHER = OptimizerInfo("SGD", 3, 0, {"float32": 3})

    def test_none_is_the_models(self):
        finding = only(trace(optimizers=(self.OTHER,)))
        assert (finding.code, finding.severity) == ("AMP309", ERROR)
        assert finding.message == (
            "None of the 3 trainable parameters of the model is held by an optimizer: there is SGD with 3 parameters, "
            "none of them the model's."
        )

    def test_one_of_several_optimizers_holds_some(self):
        assert found(trace(optimizers=(self.OTHER, OptimizerInfo("SGD", 3, 1, {"float32": 3})))) == {}

    @pytest.mark.parametrize(
        "optimizers", [(), (OptimizerInfo("SGD", 0, 0),)], ids=["no optimizer", "optimizer without parameters"]
    )
    def test_nothing_is_held(self, optimizers):
        assert found(trace(optimizers=optimizers)) == {}

    def test_nothing_to_train(self):
        assert found(trace(model=model(frozen=tuple(NET)), optimizers=(self.OTHER,))) == {}

    def test_float32_copies_of_low_precision_weights(self):
        precision = Precision("true", "cuda", "bfloat16")
        facts = {"precision": precision, "scaler": None, "training": step(None), "evaluation": None}
        assert found(trace(model=model(BRAIN), optimizers=(self.OTHER,), **facts)) == {}


class TestInternalError:
    def test_switched_off(self):
        (finding,) = findings(Trace(internal_error="ValueError: no such thing"))
        assert (finding.code, finding.severity) == ("AMP900", WARNING)
        assert "ValueError: no such thing" in finding.message

    def test_at_work(self):
        assert findings(Trace()) == []
