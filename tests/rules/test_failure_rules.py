"""The rules that judge a failure, on hand-built traces."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from rules.failures import (
    FUNCTION,
    ONE_OF_EACH,
    RAISED,
    WEIGHT,
    X,
    died_in_backward,
    failed,
    line,
    operand,
    operation,
    stale,
    write,
)
from rules.traces import ERROR, INFO, call, findings, found, model, only, region, step, trace

from ampcheck.precision import Precision
from ampcheck.rules import RULES
from ampcheck.rules.judging import judge
from ampcheck.rules.rule import Edit, Finding, told
from ampcheck.trace import (
    AutocastCall,
    BackwardHookView,
    Carried,
    CustomFunction,
    CustomFunctionState,
    CustomFunctionViewModified,
    DtypeMismatch,
    Facts,
    FailedOperation,
    FirstStepSkipped,
    FusedOptimizerClipping,
    GraphFreed,
    GraphTrace,
    Host,
    InferenceTensor,
    InPlaceDtype,
    InternalOverlap,
    LeafModified,
    LeafViewModified,
    LowPrecisionGradients,
    MissingGradients,
    ModelInfo,
    MultiViewModified,
    NoGradViewModified,
    NoGraph,
    NoNumpyDtype,
    OpNotImplemented,
    OptimizerInfo,
    Policy,
    SavedTensorModified,
    ScalerArgument,
    ScalerCall,
    ScalerOrder,
    ScalerWithoutBfloat16,
    SourceRegion,
    TensorInfo,
    Trace,
    UnsafeLoss,
    ValueRejected,
    ViewedBaseModified,
)

CODES: dict[type, str | None] = {
    AutocastCall: "AMP102",
    DtypeMismatch: "AMP203",
    InPlaceDtype: "AMP209",
    OpNotImplemented: "AMP207",
    NoNumpyDtype: "AMP212",
    CustomFunctionState: "AMP205",
    UnsafeLoss: None,
    LowPrecisionGradients: "AMP303",
    MissingGradients: "AMP304",
    ScalerOrder: "AMP306",
    ScalerArgument: "AMP312",
    ScalerWithoutBfloat16: None,
    FusedOptimizerClipping: "AMP308",
    FirstStepSkipped: "AMP310",
    SavedTensorModified: "AMP401",
    LeafModified: "AMP403",
    LeafViewModified: "AMP404",
    MultiViewModified: "AMP404",
    CustomFunctionViewModified: "AMP404",
    NoGradViewModified: "AMP404",
    ViewedBaseModified: "AMP404",
    BackwardHookView: "AMP410",
    InferenceTensor: "AMP406",
    GraphFreed: "AMP408",
    NoGraph: "AMP408",
    ValueRejected: None,
    InternalOverlap: "AMP404",
}
"""The rule that tells of each kind of failure. Some are told by what the model and the step show."""


_UNTOLD = next(facts for facts in ONE_OF_EACH if CODES[type(facts)] is None)
_IN_A_STEP = {"AMP310"}
PAIRS = (
    *(
        (code, failed(facts), failed(_UNTOLD))
        for facts in ONE_OF_EACH
        if (code := CODES[type(facts)]) is not None and code not in _IN_A_STEP
    ),
    (
        "AMP206",
        failed(DtypeMismatch(operation(X, op="mylib::pool", custom=True, autocast_rule=False))),
        failed(DtypeMismatch(operation(X, op="mylib::pool", custom=True, autocast_rule=True))),
    ),
)
"""A failure of each kind, beside one that no rule knows."""


def among(trace: Trace, code: str) -> Finding:
    """The one finding of a rule."""
    (finding,) = (finding for finding in findings(trace) if finding.code == code)
    return finding


def test_there_is_one_of_each_kind():
    assert {type(facts) for facts in ONE_OF_EACH} == set(get_args(Facts)) == set(CODES)


@pytest.mark.parametrize("facts", ONE_OF_EACH, ids=lambda facts: type(facts).__name__)
def test_each_kind_is_told_by_one_rule(facts):
    code = CODES[type(facts)]
    severity = INFO if code == "AMP310" else ERROR
    assert found(failed(facts)) == ({} if code is None else {code: severity})


def test_a_failure_of_another_kind_is_told_by_none():
    assert found(failed(None)) == {}


class TestAutocastBadArgument:
    CALL = AutocastCall(
        "device-keyword",
        "device",
        "torch.autocast(device_type='cuda')",
        call="torch.autocast(device='cuda')",
        site=RAISED,
        value="'cuda'",
    )

    def test_in_the_call(self):
        finding = only(failed(self.CALL))
        assert finding.message == (
            "`torch.autocast(device='cuda')` passes `device` ('cuda'); `autocast` calls it `device_type`."
        )
        assert finding.fix == "Write `torch.autocast(device_type='cuda')`."
        assert finding.sites == (RAISED,)
        assert finding.evidence == {
            "reason": "device-keyword",
            "argument": "device",
            "call": "torch.autocast(device='cuda')",
            "value": "'cuda'",
            "replaces": "call",
            "corrected": "torch.autocast(device_type='cuda')",
        }

    def test_in_a_mapping(self):
        written = line(3, "amp = dict(device='cuda')")
        facts = dataclasses.replace(
            self.CALL,
            call="torch.autocast(**amp)",
            replaces="kwargs",
            corrected="amp = dict(device_type='cuda')",
            kwargs_variable="amp",
            kwargs_site=written,
        )
        finding = only(failed(facts))
        assert "passes `device` ('cuda'), which comes from `amp`" in finding.message
        assert finding.fix == "Write `amp = dict(device_type='cuda')`."
        assert finding.sites == (RAISED, written)
        assert finding.evidence["kwargs_variable"] == "amp"

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            (
                AutocastCall("unexpected-keyword", "dtypo", "...", allowed=("device_type", "dtype")),
                "A call of `autocast` passes `dtypo`, which `autocast` does not take; it takes `device_type`, `dtype`.",
            ),
            (
                AutocastCall("device-type-keyword", "device_type", "...", deprecated="torch.cuda.amp.autocast"),
                "A call of `autocast` passes `device_type`; `torch.cuda.amp.autocast` does not take it.",
            ),
            (
                AutocastCall("no-device-type", "device_type", "...", kwargs_variable="amp"),
                "A call of `autocast` passes no `device_type` (`amp` does not contain it), and `autocast` has no "
                "default for it.",
            ),
            (
                AutocastCall("device-not-a-string", "device_type", "...", type="torch.device", value="x.device"),
                "A call of `autocast` passes a `torch.device` as `device_type` (x.device); it must be a string.",
            ),
            (
                AutocastCall("dtype-not-a-dtype", "dtype", "...", type="str"),
                "A call of `autocast` passes a `str` as `dtype`; it must be a `torch.dtype`.",
            ),
            (
                AutocastCall("unknown-device", "device_type", "...", device="gpu"),
                "A call of `autocast` asks for `gpu`; autocast does not know this device type.",
            ),
            (
                AutocastCall("wrong-arguments", "device_type", "..."),
                "A call of `autocast` passes arguments that `autocast` does not take.",
            ),
        ],
        ids=lambda value: getattr(value, "reason", ""),
    )
    def test_reasons(self, facts, message):
        assert only(failed(facts)).message == message


class TestDtypeMismatch:
    def test_evidence(self):
        finding = only(failed(DtypeMismatch(operation(regions=(SourceRegion("cuda", False, line(29)),)))))
        assert finding.message == (
            "In head (Linear), operands had different dtypes in `F.linear(x, self.weight)`: x is float16[2, 4] (made "
            "by stem), head.weight is float32[4, 4]. Autocast did not cast them: the region at net.py:29 turns it off."
        )
        assert finding.module == "head"
        assert [site.line for site in finding.sites] == [30, 20, 29]
        assert finding.fix == (
            "Cast to float32 first: `x.float()`, or remove the region at net.py:29 so that autocast casts."
        )
        assert finding.evidence == {
            "operands": [
                {
                    "name": "x", "dtype": "float16", "shape": [2, 4], "device": "cuda:0",
                    "producer": {"module": "stem", "file": "/work/net.py", "line": 20, "code": "self.stem(x)"},
                },
                {"name": "head.weight", "dtype": "float32", "shape": [4, 4], "device": "cuda:0", "kind": "parameter"},
            ],
            "op": "aten::linear",
            "expression": "F.linear(x, self.weight)",
            "autocast_rule": True,
            "reason": "autocast-disabled-here",
        }  # fmt: skip
        assert finding.told_by is None

    @pytest.mark.parametrize(
        ("failed_operation", "reason"),
        [
            (operation(in_place=True), "in-place-or-out"),
            (operation(out=True), "in-place-or-out"),
            (operation(X, operand("head.weight", "bfloat16", 4, 4, stored="parameter")), "parameter-not-float32"),
            (operation(thread=True), "other-thread"),
            (operation(regions=(SourceRegion("cuda", False, line(29)),)), "autocast-disabled-here"),
            (operation(regions=(SourceRegion("cpu", True, line(29)),)), "autocast-never-entered"),
            (operation(), "autocast-never-entered"),
            (operation(opaque_regions=True), "unknown"),
            (operation(regions=(SourceRegion(None, True, line(29)),)), "unknown"),
            (operation(regions=(SourceRegion("cuda", None, line(29)),)), "unknown"),
            (operation(regions=(SourceRegion("cuda", True, line(29)),), autocast_rule=False), "op-unknown-to-autocast"),
            (
                operation(X, operand("y", "float64", 4), regions=(SourceRegion("cuda", True, line(29)),)),
                "float64-operand",
            ),
            (
                operation(
                    X,
                    WEIGHT,
                    operand("y", "bfloat16", 4),
                    regions=(SourceRegion("cuda", True, line(29)),),
                ),
                "cached-cast",
            ),
        ],
    )
    def test_reason_by_the_source(self, failed_operation, reason):
        finding = only(failed(DtypeMismatch(failed_operation), training=None, evaluation=None))
        assert finding.evidence["reason"] == reason

    def test_autocast_refuses_to_promote(self):
        on = (SourceRegion("cuda", True, line(29)),)
        facts = DtypeMismatch(operation(X, operand("y", "float32", 4), regions=on), promotes=True)
        finding = only(failed(facts))
        assert "autocast refused to promote operands in `F.linear(x, self.weight)`" in finding.message
        assert finding.evidence["reason"] == "promotion-refused"

    def test_reason_by_the_step_that_died(self):
        off = region(enabled=False, requested=False, line=27, left_by="RuntimeError: words")
        died = step(None, off, calls=(call("head", None, 0),))
        finding = among(failed(DtypeMismatch(operation(opaque_regions=True)), training=died), "AMP203")
        assert finding.evidence["reason"] == "autocast-disabled-here"
        assert finding.sites[-1].line == 27

    def test_reason_by_an_earlier_step(self):
        earlier = step("float16", region(), region(index=1, enabled=False, requested=False, line=28, outer=0))
        earlier = dataclasses.replace(earlier, calls=(call("stem"), call("head", None, 1), call("", leaf=False)))
        finding = among(failed(DtypeMismatch(operation(opaque_regions=True)), training=earlier), "AMP203")
        assert finding.evidence["reason"] == "autocast-disabled-here"
        assert finding.sites[-1].line == 28

    def test_reason_by_the_policy_of_a_sharded_model(self):
        policy = Policy("", "float16", False, "MixedPrecisionPolicy(param_dtype=torch.float16)")
        sharded = dataclasses.replace(model(), policies=(policy,))
        weight = operand("head.weight", "float16", 4, 4, stored="parameter")
        facts = DtypeMismatch(operation(operand("x", "float32", 2, 4), weight))
        finding = among(failed(facts, model=sharded), "AMP203")
        assert finding.evidence["reason"] == "sharding-policy"
        assert finding.fix == (
            "Remove `cast_forward_inputs=False` from the policy, or cast the input: `x.to(torch.float16)`."
        )

    def test_cast_of_an_input_does_not_name_the_weight(self):
        """The user's line calls the layer, whose weight `self.weight` of the layer's own code is not there."""
        weight = operand("head.weight", "float16", 4, 4, stored="parameter")
        finding = only(failed(DtypeMismatch(operation(operand("x", "float32", 2, 4), weight))))
        assert finding.fix == (
            "Keep head.weight float32 and let autocast cast it, or cast the input: `x.to(torch.float16)`."
        )

    def test_only_what_can_be_pasted_is_code(self):
        on = (SourceRegion("cuda", True, line(29)),)
        double = operand("head.scale", "float64", 4, stored="buffer")
        finding = only(failed(DtypeMismatch(operation(operand("y", "float64", 4), double, WEIGHT, regions=on))))
        assert finding.fix == "Cast to float32 first, or where it is made: `y.float()`, `.float()` on head.scale."
        inside = operand("input", "float32", 2, 4, library=True)
        weight = operand("head.weight", "float16", 4, 4, stored="parameter")
        assert only(failed(DtypeMismatch(operation(inside, weight)))).fix.endswith("`.to(torch.float16)` on input.")
        told = tuple(operand(name, dtype, device=None) for name, dtype in (("mat1", "float16"), ("mat2", "float32")))
        assert only(failed(DtypeMismatch(operation(*told)))).fix == "Cast to float32 first: `.float()` on mat1."

    def test_known_from_the_message_alone(self):
        facts = DtypeMismatch(FailedOperation(("float16", "float32")))
        finding = only(failed(facts, module=None, module_type=None, training=None, evaluation=None))
        assert finding.message == ("Operands had different dtypes. Autocast did not cast them: the reason is unknown.")
        assert finding.evidence == {"operands": [], "reason": "unknown"}


class TestCustomFunctionWithoutCast:
    @pytest.mark.parametrize(
        ("kind", "code"), [(DtypeMismatch, "AMP203"), (InPlaceDtype, "AMP209"), (OpNotImplemented, "AMP207")]
    )
    def test_is_told_once(self, kind, code):
        crash = failed(kind(operation(function=FUNCTION)))
        assert found(crash) == {"AMP205": ERROR, code: ERROR}
        (finding,) = told(findings(crash))
        assert finding.code == "AMP205"
        assert finding.message.endswith("The custom function `Scatter` has no `custom_fwd`.")
        assert finding.evidence["function"] == "Scatter"
        assert finding.evidence["reason"] == "custom-function"
        assert finding.sites[-1].line == 5

    def test_is_told_by_the_other_rule_where_this_one_is_not_judged(self):
        both = findings(failed(DtypeMismatch(operation(function=FUNCTION))))
        mismatch = [finding for finding in both if finding.code == "AMP203"]
        assert told(mismatch) == tuple(mismatch)
        assert all("told_by" not in finding.evidence for finding in both)

    def test_one_that_casts(self):
        casting = dataclasses.replace(FUNCTION, custom_fwd=True, cast_inputs="float32")
        assert found(failed(DtypeMismatch(operation(function=casting)))) == {"AMP203": ERROR}

    def test_in_backward(self):
        function = dataclasses.replace(FUNCTION, method="backward", custom_fwd=True)
        finding = told(findings(failed(DtypeMismatch(operation(function=function)), phase="backward")))[0]
        assert "runs its backward without autocast, but its forward with it" in finding.message
        assert "`backward` with `@torch.amp.custom_bwd(device_type='cuda')`" in finding.fix

    @pytest.mark.parametrize(
        ("setup_context", "lacks"), [(False, "no `custom_fwd`"), (True, "`setup_context`, so `custom_fwd`")]
    )
    def test_state_that_nobody_recorded(self, setup_context, lacks):
        function = CustomFunction("Scatter", site=line(5), custom_bwd=True, setup_context=setup_context)
        finding = only(failed(CustomFunctionState(function), phase="backward"))
        assert f"its forward has {lacks}" in finding.message
        assert finding.evidence == {"operands": [], "function": "Scatter", "reason": "custom-function"}


class TestOpUnknownToAutocast:
    CUSTOM = operation(X, operand("rois", "float32", 5), op="mylib::pool", custom=True, autocast_rule=False)

    @pytest.mark.parametrize(("kind", "code"), [(DtypeMismatch, "AMP203"), (OpNotImplemented, "AMP207")])
    def test_custom_op(self, kind, code):
        crash = failed(kind(self.CUSTOM))
        assert found(crash) == {"AMP206": ERROR, code: ERROR}
        finding = among(crash, "AMP206")
        assert finding.message == (
            "`mylib::pool` has no autocast rule, so nothing cast its operands: x is float16[2, 4] (made by stem), rois "
            "is float32[5]."
        )
        assert finding.fix == "Cast before the call: `x.float()`."
        assert finding.evidence["reason"] == "op-unknown-to-autocast"

    @pytest.mark.parametrize(
        "known",
        [{"custom": False}, {"autocast_rule": True}, {"autocast_rule": None}],
        ids=["PyTorch's own", "has a rule", "unknown"],
    )
    def test_others(self, known):
        assert found(failed(DtypeMismatch(dataclasses.replace(self.CUSTOM, **known)))) == {"AMP203": ERROR}


class TestOpNotImplemented:
    def test_names_the_op(self):
        finding = only(failed(OpNotImplemented(operation(X, op="cdist", expression="torch.cdist(x, y)"))))
        assert finding.message == (
            "In head (Linear), cdist has no kernel for float16 in `torch.cdist(x, y)`: x is float16[2, 4] (made by "
            "stem)."
        )
        assert finding.fix.startswith("Cast to float32 for this call: `x.float()`.")

    def test_what_a_library_holds_cannot_be_cast(self):
        inside = operand("boxes", "float16", 4, library=True)
        finding = only(failed(OpNotImplemented(operation(inside, op="nms"))))
        assert "`boxes.float()`" not in finding.fix
        assert finding.evidence["operands"][0]["library"] is True


class TestInPlaceDtype:
    OUT = operand("out", "float32", 4, role="destination")
    SOURCE = operand("y", "float16", 4, role="source")

    def test_target_and_source(self):
        finding = only(failed(InPlaceDtype(operation(self.OUT, self.SOURCE, op="aten::index_put_"))))
        assert "the target and the source of a write have different dtypes" in finding.message
        assert finding.fix == "Cast the source, `y.to(out.dtype)`, or make out with `dtype=y.dtype`."
        assert finding.evidence["reason"] == "in-place-or-out"
        assert [one["role"] for one in finding.evidence["operands"]] == ["destination", "source"]

    def test_parameters_have_other_names_in_the_source(self):
        source = operand("fc.weight", "float32", 4, stored="parameter")
        finding = only(failed(InPlaceDtype(operation(operand("average", "float16", 4), source))))
        assert finding.fix == (
            "Cast the source, `.to(average.dtype)` on fc.weight, or make average with `dtype=torch.float32`."
        )
        target = operand("memory", "float32", 4, stored="buffer")
        finding = only(failed(InPlaceDtype(operation(target, self.SOURCE))))
        assert finding.fix == "Cast the source, `y.to(torch.float32)`, or make memory with `dtype=y.dtype`."

    def test_integer_target(self):
        finding = only(failed(InPlaceDtype(operation(operand("out", "int64", 4), self.SOURCE))))
        assert finding.fix == "Make out a floating-point tensor, or use the out-of-place operation."

    def test_known_from_the_message_alone(self):
        told = (operand("the target", "float32", device=None), operand("the source", "float16", device=None))
        told = tuple(dataclasses.replace(one, shape=None) for one in told)
        finding = only(failed(InPlaceDtype(operation(*told))))
        assert finding.fix.startswith("Cast the source to the dtype of the target")
        assert finding.evidence["operands"][0] == {"name": "the target", "dtype": "float32", "shape": None}


class TestNoNumpyDtype:
    def test_names_the_tensor(self):
        tensor = operand("scores", "bfloat16", 8)
        finding = only(failed(NoNumpyDtype(operation(tensor, op=None, expression="scores.numpy()"))))
        assert finding.message.endswith(
            "a bfloat16 tensor was passed to NumPy in `scores.numpy()`: scores is bfloat16[8]."
        )
        assert finding.fix == "Write `scores.float().numpy()`."

    @pytest.mark.parametrize(
        ("expression", "fix"),
        [
            ("scores.detach().cpu().numpy()", "Write `scores.float().detach().cpu().numpy()`."),
            ("numpy.asarray(scores)", "Cast to float32 first: `scores.float()`."),
            (None, "Cast to float32 first: `scores.float()`."),
        ],
    )
    def test_what_the_line_calls_stays(self, expression, fix):
        tensor = operand("scores", "bfloat16", 8)
        assert only(failed(NoNumpyDtype(operation(tensor, op=None, expression=expression)))).fix == fix


class TestUnscaleLowPrecisionGradients:
    NAMES = ("head.weight", "head.bias")

    def test_cast_during_the_fit(self):
        cast = line(8, "model.half()", "cast")
        facts = LowPrecisionGradients("SGD", 3, ("stem.weight", "stem.bias"), cast)
        finding = only(failed(facts, module=None, phase="unscale"))
        assert finding.message == (
            "2 parameters of the 3 in SGD have float16 gradients: stem.weight and stem.bias. They were float32 when "
            "the fit began: something cast the model during the fit. `model.half()` at net.py:8 casts them to float16."
        )
        assert finding.module == "stem"
        assert finding.sites == (RAISED, cast)
        assert finding.evidence == {"count": 2, "optimized": 3, "parameters": ["stem.weight", "stem.bias"]}

    def test_float16_from_the_beginning(self):
        low = model({"stem.weight": "float16", "head.weight": "float32"})
        finding = among(failed(LowPrecisionGradients("SGD", 2, ("stem.weight",)), model=low), "AMP303")
        assert "1 parameter of the 2 in SGD has a float16 gradient: stem.weight." in finding.message
        assert "They were float16 when the fit began." in finding.message

    def test_optimizer_not_seen(self):
        assert only(failed(LowPrecisionGradients())).message == "The scaler got float16 gradients."


class TestNoInfChecks:
    @pytest.mark.parametrize(
        ("why", "words"),
        [
            ("frozen", "head.weight is frozen"),
            ("not-the-models", "head.weight is not the model's"),
            ("no-gradient", "head.weight got no gradient (the loss does not depend on it"),
        ],
    )
    def test_reasons(self, why, words):
        finding = only(failed(MissingGradients("SGD", 1, {why: ("head.weight",)}, gradients_elsewhere=2)))
        assert words in finding.message
        assert finding.message.endswith("2 parameters of the model that the optimizer does not hold got gradients.")
        assert finding.evidence == {
            "reason": why,
            "optimized": 1,
            "without_gradient": {why: ["head.weight"]},
            "gradients_elsewhere": 2,
        }

    def test_several_reasons(self):
        facts = MissingGradients("SGD", 2, {"frozen": ("stem.weight",), "no-gradient": ("head.weight",)})
        assert only(failed(facts)).evidence["reason"] == "several"

    def test_optimizer_not_seen(self):
        assert only(failed(MissingGradients())).message == "No parameter of the optimizer has a gradient."


class TestScalerOutOfOrder:
    @pytest.mark.parametrize(
        ("reason", "message"),
        [
            ("unscaled-twice", "`unscale_()` ran twice for SGD with no `update()` in between."),
            ("unscaled-late", "`unscale_()` ran for SGD after `step()`."),
            ("stepped-twice", "`step()` ran twice for SGD with no `update()` in between."),
            ("never-scaled", "The scaler was used for SGD before it had scaled any loss."),
            ("early-update", "`update()` ran before any optimizer was stepped or unscaled."),
        ],
    )
    def test_reasons(self, reason, message):
        finding = only(failed(ScalerOrder(reason, "SGD"), phase="unscale"))
        assert finding.message == message
        assert finding.evidence == {"reason": reason}

    def test_names_the_earlier_call(self):
        scaling = (ScalerCall("backward", line(10), scaled=True), ScalerCall("unscale", line(11)))
        finding = only(failed(ScalerOrder("unscaled-twice"), training=step(scaling=scaling)))
        assert finding.message == (
            "`unscale_()` ran twice for the optimizer with no `update()` in between; the earlier call is at net.py:11."
        )
        assert [site.line for site in finding.sites] == [30, 11]

    def test_a_step_that_ended_holds_no_earlier_call(self):
        scaling = (ScalerCall("unscale", line(11)), ScalerCall("step", line(12)), ScalerCall("update", line(13)))
        finding = only(failed(ScalerOrder("unscaled-twice"), training=step(scaling=scaling)))
        assert finding.sites == (RAISED,)


class TestScalerBadArgument:
    @pytest.mark.parametrize(
        ("code", "call", "corrected", "after"),
        [
            (
                'scaler = torch.amp.GradScaler(device_type="cpu")',
                "torch.amp.GradScaler(device_type='cpu')",
                "torch.amp.GradScaler(device='cpu')",
                "scaler = torch.amp.GradScaler(device='cpu')",
            ),
            ("with scaled(GradScaler(x=1)):", "GradScaler(x=1)", "GradScaler()", "with scaled(GradScaler()):"),
        ],
    )
    def test_the_corrected_call(self, code, call, corrected, after):
        facts = ScalerArgument("device_type", call=call, corrected=corrected)
        crash = failed(facts)
        assert crash.failure is not None
        raised = dataclasses.replace(crash.failure, sites=(line(30, code, "raise"),))
        finding = only(dataclasses.replace(crash, failure=raised))
        assert finding.fix == f"Write `{corrected}`."
        assert finding.edit is not None
        assert (finding.edit.before, finding.edit.after) == (code, after)

    def test_closure(self):
        finding = only(failed(ScalerArgument("closure")))
        assert finding.message.startswith("`GradScaler.step()` got a closure.")
        assert finding.evidence == {"argument": "closure"}

    def test_keyword(self):
        finding = only(failed(ScalerArgument("device_type")))
        assert finding.message == "`GradScaler` does not take `device_type`."
        assert finding.evidence == {"argument": "device_type"}

    def test_device_for_the_scale(self):
        finding = only(failed(ScalerArgument("init_scale", "'cuda'", "torch.cuda.amp.GradScaler")))
        assert finding.message == ("`torch.cuda.amp.GradScaler` got the initial scale 'cuda', which is not a number.")
        assert finding.evidence == {"argument": "init_scale", "value": "'cuda'"}


def test_fused_optimizer_clipping_names_the_optimizers():
    optimizers = (OptimizerInfo("AdamW", 3, 3, {"float32": 3}, unscales=True),)
    finding = only(failed(FusedOptimizerClipping(), optimizers=optimizers, phase="clip"))
    assert finding.message.startswith("AdamW unscales the gradients inside its own step")
    assert finding.evidence == {"optimizers": ["AdamW"]}


class TestFirstStepSkipped:
    def test_warning_raised(self):
        finding = only(failed(FirstStepSkipped()))
        assert finding.message.endswith("AmpCheck did not see whether the scaler skipped it.")
        assert finding.evidence == {"skipped": None}

    def test_warning_raised_and_step_seen(self):
        scaling = (ScalerCall("step", line(12), skipped=True),)
        finding = only(failed(FirstStepSkipped(), training=step(scaling=scaling)))
        assert finding.message.endswith("the scaler skipped it at net.py:12.")
        assert finding.evidence == {"skipped": True}

    def test_step_that_was_taken(self):
        assert found(trace(training=step(scaling=(ScalerCall("step", line(12), skipped=False),)))) == {}


class TestSavedTensorModified:
    def test_write_and_save(self):
        finding = only(died_in_backward(stale(write(), version_found=1)))
        assert finding.code == "AMP401"
        assert finding.message == "The output of relu was modified in place before backward could use it."
        assert finding.module == "head"
        assert [(site.line, site.role) for site in finding.sites] == [(41, "write"), (40, "save")]
        assert finding.fix == "Write `x = x.mul(2)` at net.py:41."
        assert finding.edit == Edit("/work/net.py", 41, "x.mul_(2)", "x = x.mul(2)")
        assert finding.evidence == {
            "dtype": "float32",
            "shape": [2, 4],
            "version_saved": 0,
            "version_found": 1,
            "node": "ReluBackward0",
            "slot": "result",
            "op": "aten::mul_",
        }

    def test_lists_the_others(self):
        finding = only(died_in_backward(stale(write()), stale(write(), node="ExpBackward0")))
        assert "1 more saved tensor is stale: result of ExpBackward0 at net.py:40." in finding.message
        assert [one["node"] for one in finding.evidence["also_stale"]] == ["ExpBackward0"]

    def test_write_that_was_not_seen(self):
        assert only(died_in_backward(stale())).message.endswith("AmpCheck did not see which line wrote.")

    def test_graph_that_was_not_seen(self):
        finding = only(died_in_backward(unobserved={"graph": "the step was not watched"}))
        assert finding.message == (
            "The output of Relu was modified in place before backward could use it. AmpCheck did not see which line "
            "wrote: the step was not watched."
        )
        assert finding.evidence == {"node": "Relu", "dtype": "float32", "shape": [2, 4]}

    def test_stale_tensors_without_a_failure(self):
        assert found(trace(graph=GraphTrace((stale(write()),)))) == {}


def test_optimizer_step_before_backward():
    stepped = write(50, "optimizer.step()", "aten::_foreach_add_", by="optimizer")
    finding = only(died_in_backward(stale(stepped, name="head.weight")))
    assert finding.code == "AMP405"
    assert finding.message.startswith("The optimizer step at net.py:50 changed head.weight between the forward pass")
    assert found(trace(graph=GraphTrace((stale(stepped, name="head.weight"),)))) == {}


def test_buffer_rewritten_between_forwards():
    finding = only(died_in_backward(stale(write(by="buffer-broadcast"), name="head.mask", buffer=True)))
    assert finding.code == "AMP407"
    assert "overwritten by the buffer broadcast of DistributedDataParallel at net.py:41" in finding.message
    assert found(trace(graph=GraphTrace((stale(write(by="buffer-broadcast"), buffer=True),)))) == {}


class TestLeafModified:
    def test_names_the_line(self):
        finding = only(failed(LeafModified(), raised=line(9, "p -= lr * p.grad", "raise")))
        assert finding.message == (
            "A leaf tensor that requires grad was modified in place by `p -= lr * p.grad` at net.py:9."
        )
        assert finding.sites[0].role == "write"
        assert finding.evidence == {}


class TestViewModified:
    WRITE = line(9, "gate *= value", "raise")
    SPLIT = line(8, "gate, value = x.chunk(2)", op="aten::split")

    @pytest.mark.parametrize(
        ("facts", "subject", "evidence"),
        [
            (LeafViewModified(), "A view of a leaf that requires grad", {}),
            (
                MultiViewModified("Split", 1),
                "An output of Split, which returns several views at once,",
                {"node": "Split", "output": 1},
            ),
            (
                CustomFunctionViewModified("Same", 0),
                "A view that the custom function Same returned",
                {"node": "Same", "output": 0},
            ),
            (NoGradViewModified(mode="inference"), "A view made under inference", {"mode": "inference"}),
        ],
        ids=["leaf", "multi-view", "custom function", "no grad"],
    )
    def test_kinds(self, facts, subject, evidence):
        finding = only(failed(facts, raised=self.WRITE))
        assert finding.message == f"{subject} was modified in place at net.py:9."
        assert finding.evidence == evidence

    def test_names_the_call_that_made_the_view(self):
        graph = GraphTrace(views=(self.SPLIT, line(7, "x.unbind()", op="aten::unbind")))
        finding = only(failed(MultiViewModified("Split", 1), raised=self.WRITE, graph=graph))
        assert finding.message.endswith("; the view was made at net.py:8.")
        assert [site.line for site in finding.sites] == [9, 8]

    def test_base_written_to_first(self):
        written = line(12, "x.mul_(2)", "write")
        graph = GraphTrace(views=(self.SPLIT,), written_views=((self.SPLIT, (written,)),))
        finding = only(failed(ViewedBaseModified("Split", 1), graph=graph))
        assert finding.message == (
            "An output of Split, which is a view, was used at net.py:30 after its base, or another view of that base, "
            "had been modified in place at net.py:12; the view was made at net.py:8."
        )
        assert [(site.line, site.role) for site in finding.sites] == [(12, "write"), (8, "call"), (30, "call")]

    def test_elements_that_share_memory(self):
        write = line(9, "m[:, 0] += 1", "raise")
        finding = only(failed(InternalOverlap(), raised=write))
        assert finding.message == (
            "A view in which several elements are the same memory, such as `expand` makes, was modified in place at "
            "net.py:9."
        )
        assert finding.edit is not None
        assert finding.edit.after == "m = m.clone()\nm[:, 0] += 1"
        finding = only(failed(InternalOverlap(with_input=True), raised=write))
        assert finding.message == ("The write at net.py:9 reads memory that it also writes to, through another view.")
        assert finding.edit is None


class TestInferenceTensor:
    @pytest.mark.parametrize(
        ("use", "said"),
        [
            ("saved", "Autograd needs to save a tensor that was made under `inference_mode` at net.py:30."),
            (
                "written",
                "A tensor that was made under `inference_mode` was modified in place outside of it at net.py:30.",
            ),
            ("leaf", "A tensor that was made under `inference_mode` was set to require grad at net.py:30."),
        ],
    )
    def test_uses(self, use, said):
        assert only(failed(InferenceTensor(use))).message == said

    def test_names_the_line_that_made_it(self):
        finding = only(failed(InferenceTensor("saved"), graph=GraphTrace(inference=(line(4), line(6)))))
        assert finding.message.endswith("; it was made at net.py:6.")
        assert [site.line for site in finding.sites] == [30, 6]


class TestGraphFreedOrDetached:
    def test_names_the_first_backward(self):
        finding = only(failed(GraphFreed(), phase="backward", graph=GraphTrace(backwards=(line(50), line(51)))))
        assert (
            finding.message
            == "Backward at net.py:30 reached a part of the graph that an earlier backward at net.py:50 had freed."
        )
        assert [site.line for site in finding.sites] == [30, 50]

    def test_what_a_step_takes_over_is_to_be_detached(self):
        graph = GraphTrace(
            backwards=(line(50), line(50)), carried=(Carried("state = state.detach()", line(50, "loss.backward()")),)
        )
        finding = only(failed(GraphFreed(), phase="backward", graph=graph))
        assert finding.fix == (
            "Detach what the step takes over from the one before it: insert `state = state.detach()` after net.py:50."
        )
        assert finding.edit is not None
        assert finding.edit.after == "loss.backward()\nstate = state.detach()"

    def test_names_the_call_that_cut_the_graph(self):
        graph = GraphTrace(cut=(line(44, "x.detach()", op="aten::detach"),))
        finding = only(failed(NoGraph(), phase="backward", graph=graph))
        assert finding.message == (
            "Backward at net.py:30 ran on a loss without a graph: detach at net.py:44 returned a tensor without one."
        )

    def test_a_loss_made_of_numbers(self):
        finding = only(failed(NoGraph(), phase="backward"))
        assert finding.fix.startswith("Compute the loss from what the model returned")

    def test_nothing_was_seen(self):
        finding = only(failed(NoGraph(), phase="backward", training=None))
        assert finding.message == "Backward at net.py:30 ran on a loss without a graph."
        assert finding.fix.startswith("Call `requires_grad_(True)` on the parameters to train")


def test_backward_hook_names_the_modules():
    finding = only(failed(BackwardHookView(), graph=GraphTrace(hooked=("stem", ""))))
    assert finding.message == (
        "A tensor that a full backward hook wraps was modified in place at net.py:30; full backward hooks are on "
        "module stem and the model itself."
    )
    assert finding.evidence == {"hooked": ["stem", ""]}


class TestSituations:
    """What a host advises for one situation of a rule."""

    def _found(self, facts, fixes, **more):
        crash = failed(facts, **more)
        return findings(dataclasses.replace(crash, host=Host("host", "1.0", fixes)))

    def test_a_model_in_low_precision(self):
        weight = operand("head.weight", "bfloat16", 4, 4, stored="parameter")
        facts = DtypeMismatch(operation(operand("x + noise", "float32", 2, 4), weight))
        half = ModelInfo("Net", "cpu", (), (TensorInfo("head.weight", "bfloat16", (4, 4), "cpu", True),))
        true = Precision("true", "cpu", "bfloat16")
        fixes = {"AMP203": "Other.", "AMP203:low-precision-model": "Convert the images."}
        (finding,) = self._found(facts, fixes, model=half, precision=true, scaler=None, training=None, evaluation=None)
        assert finding.host_fix == "Convert the images."
        assert "`(x + noise).to(torch.bfloat16)`" in finding.fix
        assert "float32 and let autocast" not in finding.fix

    def test_a_fix_may_be_empty_for_a_situation(self):
        weight = operand("head.weight", "bfloat16", 4, 4, stored="parameter")
        facts = DtypeMismatch(operation(operand("x", "float32", 2, 4), weight))
        finding = next(f for f in self._found(facts, {"AMP203": "Other.", "AMP203:low-precision-parameter": ""}))
        assert finding.host_fix is None


class TestNamedInferenceTensor:
    def test_names_what_holds_it_and_where_it_was_made(self):
        made = line(12, "self.grid = make()", "cast")
        finding = only(failed(InferenceTensor("saved", "self.grid", made=made)))
        assert finding.message == (
            "Autograd needs to save the tensor self.grid at net.py:30; it was made under `inference_mode` at net.py:12."
        )
        assert "`self.grid.clone()`" in finding.fix

    def test_at_fit_start_only_parameters_that_an_optimizer_holds(self):
        tensors = (TensorInfo("a", "float32", (2,), "cpu", True, False, True), TensorInfo("b", "float32", (2,), "cpu"))
        model = ModelInfo("Net", "cpu", (), tensors)
        held = OptimizerInfo("SGD", 1, 1, {"float32": 1}, names=frozenset({"a"}))
        start = trace(model=model, optimizers=(held,), scaler=None, training=None, evaluation=None)
        (finding,) = [finding for finding in findings(start) if finding.code == "AMP406"]
        assert finding.message == "1 optimized parameter was made under `inference_mode`, and cannot be trained: a."
        apart = dataclasses.replace(held, names=frozenset({"b"}))
        assert "AMP406" not in found(trace(model=model, optimizers=(apart,), training=None, evaluation=None))


def test_one_fault_is_one_finding():
    crash = failed(DtypeMismatch(operation(custom=True, autocast_rule=False, op="lib::pool")))
    judged, _ = judge(crash, RULES)
    assert [finding.code for finding in judged if finding.severity is ERROR] == ["AMP206"]


def test_operands_of_one_dtype_are_not_all_there_are():
    facts = DtypeMismatch(operation(operand("x", "bfloat16", 2, 4), operand("y", "bfloat16", 2, 4)))
    facts = dataclasses.replace(facts, operation=dataclasses.replace(facts.operation, dtypes=("bfloat16", "float32")))
    assert "y is bfloat16[2, 4], another operand is float32" in among(failed(facts), "AMP203").message
