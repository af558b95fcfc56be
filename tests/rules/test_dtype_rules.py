"""AMP201 to AMP211 on hand-built traces."""

from __future__ import annotations

import dataclasses

import pytest
from rules.traces import BF16, ERROR, INFO, NET, SCALER, WARNING, call, found, model, only, op, site, step, trace

from ampcheck.precision import Precision
from ampcheck.trace import Operand, OptimizerInfo, ScalerInfo

HALF = dict.fromkeys(NET, "float16")
BRAIN = dict.fromkeys(NET, "bfloat16")
UNDECLARED = Precision()
TRUE_HALF = Precision("true", "cuda", "float16")


def held(dtype: str) -> tuple[OptimizerInfo, ...]:
    return (OptimizerInfo("SGD", 3, 3, {dtype: 3}),)


LOW = Operand("float16", (8, 64))
POSITION = Operand("float32", (64,), "head.position")

PAIRS = (
    ("AMP201", trace(model=model(HALF), optimizers=held("float16")), trace()),
    ("AMP202", trace(model=model(NET | {"stem.weight": "float16"})), trace(model=model(HALF))),
    ("AMP204", trace(model=model(NET | {"head.weight": "float64"})), trace()),
    (
        "AMP208",
        trace(training=step(ops=(op("add", LOW, POSITION),))),
        trace(training=step(ops=(op("add", LOW, dataclasses.replace(POSITION, dtype="float16")),))),
    ),
    (
        "AMP210",
        trace(training=step(ops=(op("binary_cross_entropy"),))),
        trace(training=step(ops=(op("binary_cross_entropy", dtype=None),))),
    ),
    ("AMP211", trace(averaged=model(HALF)), trace(averaged=model())),
)


class TestLowPrecisionParameters:
    def test_float16_under_a_scaler(self):
        finding = only(trace(model=model(HALF), optimizers=held("float16")))
        assert (finding.code, finding.severity) == ("AMP201", ERROR)
        assert finding.message == (
            "3 of the 3 trainable parameters are float16 under mixed precision, and the gradient scaler refuses to "
            "unscale their gradients: stem.weight, stem.bias and head.weight."
        )

    def test_float32(self):
        assert found(trace()) == {}

    def test_float16_without_a_scaler(self):
        seen = found(trace(model=model(HALF), scaler=None, optimizers=held("float16")))
        assert seen == {"AMP201": WARNING}

    def test_bfloat16(self):
        facts = {"precision": BF16, "scaler": None, "training": step("bfloat16"), "evaluation": None}
        assert found(trace(model=model(BRAIN), optimizers=held("bfloat16"), **facts)) == {"AMP201": WARNING}

    def test_not_held_by_the_optimizer(self):
        assert found(trace(model=model(HALF | {"head.weight": "float32"}))) == {"AMP201": WARNING}

    def test_scaler_of_sharded_training_takes_float16(self):
        sharded = ScalerInfo("ShardedGradScaler", True, "cuda")
        assert found(trace(model=model(HALF), scaler=sharded, optimizers=held("float16"))) == {"AMP201": WARNING}

    def test_optimizer_that_unscales_takes_float16(self):
        fused = OptimizerInfo("AdamW", 3, 3, {"float16": 3}, unscales=True)
        others = OptimizerInfo("AdamW", 3, 0, {"float32": 3})
        finding = only(trace(model=model(HALF), optimizers=(fused, others)))
        assert (finding.code, finding.severity) == ("AMP201", WARNING)
        assert "refuses" not in finding.message
        assert found(trace(model=model(HALF), optimizers=(fused, *held("float16")))) == {"AMP201": ERROR}

    def test_one_parameter_names_its_module(self):
        one = model(NET | {"head.weight": "float16"})
        assert only(trace(model=one)).module == "head"
        assert only(trace(model=model(HALF))).module is None

    def test_frozen(self):
        net = NET | {"stem.weight": "float16", "stem.bias": "float16"}
        assert found(trace(model=model(net, frozen=("stem.weight", "stem.bias")))) == {}

    def test_whole_model_meant_to_be_low(self):
        facts = {"precision": TRUE_HALF, "scaler": None, "training": step(None), "evaluation": None}
        assert found(trace(model=model(HALF), optimizers=held("float16"), **facts)) == {}

    def test_undeclared(self):
        facts = {"precision": UNDECLARED, "model": model(HALF), "optimizers": held("float16")}
        assert found(trace(**facts)) == {"AMP201": ERROR}
        assert found(trace(**facts, scaler=None, training=step(None), evaluation=None)) == {}
        # One cause, one finding: half a model without autocast is not asking for autocast.
        assert found(trace(**facts, training=step(None), evaluation=None)) == {"AMP201": ERROR}

    def test_many_are_counted_and_a_few_named(self):
        net = {f"layer{i}.weight": "float16" for i in range(500)}
        finding = only(trace(model=model(net), optimizers=held("float16")))
        assert "500 of the 500 trainable parameters" in finding.message
        assert "layer0.weight, layer1.weight, layer2.weight and 497 more" in finding.message
        assert len(finding.evidence["parameters"]) == 500


class TestMixedDtypesInModule:
    def test_weight_and_bias(self):
        finding = only(trace(model=model(NET | {"stem.weight": "float16"}, frozen=("stem.weight",))))
        assert (finding.code, finding.severity, finding.module) == ("AMP202", WARNING, "stem")
        assert finding.message == (
            "The parameters differ in dtype inside 1 module: stem (weight float16 and bias float32)."
        )

    def test_dtypes_that_differ_between_modules(self):
        net = {"stem.weight": "bfloat16", "stem.bias": "bfloat16", "head.weight": "float32"}
        facts = {"precision": BF16, "scaler": None, "training": step("bfloat16"), "evaluation": None}
        assert found(trace(model=model(net, frozen=("stem.weight", "stem.bias")), **facts)) == {}

    @pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
    def test_quantized_weight_beside_a_scale(self, dtype):
        assert found(trace(model=model({"stem.weight": dtype, "stem.scale": "float32"}))) == {}


class TestDoublePrecision:
    def test_parameter(self):
        finding = only(trace(model=model(NET | {"head.weight": "float64"})))
        assert (finding.code, finding.severity, finding.module) == ("AMP204", WARNING, "head")
        assert finding.message == "1 parameter of the model is float64: head.weight."

    def test_buffers(self):
        finding = only(trace(model=model(buffers={"mean": "float64", "std": "float64"})))
        assert finding.message == "2 buffers of the model are float64: mean and std."

    def test_input(self):
        reached = call("stem", inputs=("float64",), kind="Conv2d"), call("head", inputs=("float64",))
        finding = only(trace(training=step(calls=reached)))
        assert (finding.code, finding.severity, finding.module) == ("AMP204", WARNING, "stem")
        assert finding.message == "A float64 input reached stem (Conv2d)."

    def test_float32_buffers_and_integers(self):
        assert found(trace(model=model(buffers={"mean": "float32", "count": "int64"}))) == {}

    def test_asked_for(self):
        double = model(dict.fromkeys(NET, "float64"), buffers={"mean": "float64"})
        training = step(None, calls=(call("stem", None, None, inputs=("float64",)),))
        facts = {"model": double, "scaler": None, "training": training, "evaluation": None}
        assert found(trace(precision=Precision("true", "cuda", "float64"), **facts)) == {}
        assert found(trace(precision=UNDECLARED, **facts)) == {}


class TestSilentPromotion:
    def ops(self, *operands, **more):
        return trace(training=step(ops=(op("add", *operands, **more),)))

    def test_parameter(self):
        finding = only(self.ops(LOW, POSITION))
        assert (finding.code, finding.severity, finding.module) == ("AMP208", INFO, "head")
        assert finding.message == (
            "head.position (in add at train.py:20) turned low-precision activations back into float32."
        )
        assert finding.sites == (site(20),)

    def test_several_are_one_finding(self):
        position, token = (Operand("float32", (64,), name) for name in ("position", "token"))
        ops = op("add", LOW, position), op("cat", token, LOW, line=21), op("add", LOW, position, line=22)
        finding = only(trace(training=step(ops=ops)))
        assert finding.message.startswith("position (in add at train.py:20) and token (in cat at train.py:21) turned")
        assert finding.evidence["tensors"]["token"] == {"op": "cat", "module": "head"}

    @pytest.mark.parametrize(
        "operand",
        [
            Operand("float16", (64,), "head.position"),
            Operand("float32", (64,)),
            Operand("float32", (), "head.scale"),
        ],
        ids=["cast", "no tensor of the model", "scalar"],
    )
    def test_look_alikes(self, operand):
        assert found(self.ops(LOW, operand)) == {}

    def test_autocast_off(self):
        assert found(self.ops(LOW, POSITION, dtype=None)) == {}

    def test_whole_model_meant_to_be_low(self):
        training = step(None, ops=(op("add", LOW, POSITION, dtype=None),))
        facts = {"precision": TRUE_HALF, "model": model(HALF), "optimizers": held("float16"), "scaler": None}
        assert found(trace(training=training, evaluation=None, **facts)) == {"AMP208": WARNING}


class TestUnsafeLoss:
    @pytest.mark.parametrize(("device_type", "severity"), [("cuda", ERROR), ("cpu", WARNING)])
    def test_under_autocast(self, device_type, severity):
        finding = only(trace(training=step(ops=(op("binary_cross_entropy", device_type=device_type),))))
        assert (finding.code, finding.severity) == ("AMP210", severity)
        assert finding.message == (
            f"binary_cross_entropy was called 1 time in head under autocast float16 on {device_type} at train.py:20."
        )

    def test_autocast_off(self):
        assert found(trace(training=step(ops=(op("binary_cross_entropy", dtype=None),)))) == {}


class TestEmaLowPrecision:
    def test_half(self):
        finding = only(trace(averaged=model(HALF, buffers={"mean": "float16"})))
        assert (finding.code, finding.severity) == ("AMP211", WARNING)
        assert "3 of the 3 parameters of the averaged copy are float16" in finding.message

    def test_float32(self):
        assert found(trace(averaged=model(buffers={"mean": "float16"}))) == {}

    def test_no_copy(self):
        assert found(trace(averaged=None, scaler=dataclasses.replace(SCALER))) == {}
