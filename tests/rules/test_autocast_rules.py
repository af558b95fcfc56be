"""AMP101 to AMP110 on hand-built traces."""

from __future__ import annotations

import dataclasses

import pytest
from rules.traces import (
    BF16,
    ERROR,
    FP16,
    INFO,
    NET,
    SCALER,
    WARNING,
    call,
    calls,
    found,
    model,
    only,
    op,
    region,
    site,
    step,
    trace,
)

from ampcheck.precision import Precision
from ampcheck.trace import Environment, Host, ScalerInfo, StepTrace

UNDECLARED = Precision()
TRUE32 = Precision("true", "cuda", "float32", False, "precision='32-true'")
EMULATED = Environment("2.15.0", {("cuda", "bfloat16"): False, ("cuda", "float16"): True})
FAULTY = Environment("2.4.1", autocast_cache_fault=True)
OLD = "torch.cuda.amp.autocast"


def off(*regions, **more) -> StepTrace:
    return step(None, *regions, **more)


def twice(*order: bool, **more) -> StepTrace:
    """Two passes inside one region, with gradients or without."""
    return step(calls=tuple(made for grad in order for made in calls("float16", grad=grad, **more)))


PAIRS = (
    ("AMP101", trace(training=off()), trace()),
    ("AMP103", trace(training=off(region("cpu"))), trace(training=step("float16", region("cuda:0")))),
    ("AMP104", trace(precision=BF16), trace(precision=BF16, training=step("bfloat16"))),
    ("AMP105", trace(evaluation=off()), trace()),
    ("AMP106", trace(training=step(ops=(op("backward"),))), trace(training=step(ops=(op("backward", dtype=None),)))),
    ("AMP107", trace(precision=BF16, training=step("bfloat16"), environment=EMULATED), trace(environment=EMULATED)),
    ("AMP108", trace(training=step("float16", region(deprecated=OLD))), trace()),
    (
        "AMP109",
        trace(training=twice(False, True), environment=FAULTY),
        trace(training=twice(True, False), environment=FAULTY),
    ),
    ("AMP110", trace(training=step(calls=(call("stem"), call("head", None, None)))), trace()),
)


@pytest.mark.parametrize("precision", [FP16, UNDECLARED], ids=["declared", "undeclared"])
def test_a_healthy_run_has_no_findings(precision):
    assert found(trace(precision=precision)) == {}


class TestAutocastNotActive:
    def test_no_region(self):
        finding = only(trace(training=off(), evaluation=off()))
        assert (finding.code, finding.severity) == ("AMP101", ERROR)
        assert finding.message == (
            "Mixed float16 was asked for by --amp, but none of the 3 module calls of the training step ran under "
            "autocast."
        )

    def test_region_made_with_enabled_false_is_named(self):
        training = off(region(enabled=False, requested=False))
        finding = only(trace(training=training, evaluation=None))
        assert (finding.code, finding.severity) == ("AMP101", ERROR)
        assert "Autocast was entered with enabled=False for cuda at train.py:12." in finding.message
        assert finding.sites == (site(),)

    def test_a_default_that_nobody_chose_is_information(self):
        precision = dataclasses.replace(FP16, explicit=False)
        assert found(trace(precision=precision, training=off(), evaluation=None)) == {"AMP101": INFO}

    def test_enabled_scaler_asks_where_nothing_is_declared(self):
        assert found(trace(precision=UNDECLARED, training=off(), evaluation=None)) == {"AMP101": ERROR}

    def test_nothing_asks(self):
        assert found(trace(precision=UNDECLARED, scaler=None, training=off(), evaluation=off())) == {}

    def test_float32_asked_for(self):
        assert found(trace(precision=TRUE32, scaler=None, training=off(), evaluation=off())) == {}

    def test_teacher_alone_under_autocast(self):
        teacher = call("stem", grad=False)
        training = off(region(), calls=(teacher, *calls(None, None)))
        assert found(trace(training=training, evaluation=None)) == {"AMP101": ERROR}

    def test_region_around_the_loss_alone_is_doubtful(self):
        training = off(region(), calls=calls(None, None))
        assert found(trace(training=training, evaluation=None)) == {"AMP101": WARNING}

    def test_autocast_entered_inside_the_model(self):
        training = step("float16", calls=(call("stem"), call("head"), call("", None, None, leaf=False)))
        assert found(trace(training=training, evaluation=training)) == {}

    def test_compiled_model_is_doubtful(self):
        assert found(trace(model=model(compiled=True), training=off(), evaluation=None)) == {"AMP101": WARNING}

    def test_recomputation_in_backward_does_not_count(self):
        training = off(region(), calls=(*calls(None, None), call("stem", backward=True)))
        assert "AMP101" in found(trace(training=training, evaluation=None))

    def test_no_calls(self):
        assert found(trace(training=StepTrace(), evaluation=None)) == {}


class TestAutocastWrongDevice:
    def wrong(self, *regions, **facts):
        facts = {"evaluation": None, "scaler": None, "precision": BF16, "model": model(device_type="cpu")} | facts
        return trace(training=off(*regions, calls=calls(None, 0, device_type="cpu")), **facts)

    def test_other_device_type(self):
        finding = only(self.wrong(region("cuda", "bfloat16", enabled=False)))
        assert (finding.code, finding.severity) == ("AMP103", ERROR)
        assert finding.message == (
            "The autocast region for cuda in bfloat16 at train.py:12 did nothing: the model is on cpu, and torch "
            "switched it off. None of the 3 module calls of the training step ran under autocast."
        )
        assert finding.sites == (site(),)
        assert finding.evidence["reason"] == "other-device-type"

    def test_other_device_type_that_is_on(self):
        finding = only(self.wrong(region("cuda:0", "bfloat16")))
        assert (finding.code, finding.severity) == ("AMP103", ERROR)
        assert "did nothing: the model is on cpu. None of" in finding.message

    def test_right_device_type(self):
        training = step("bfloat16", region("cpu", "bfloat16"), calls=calls("bfloat16", 0, device_type="cpu"))
        facts = {"model": model(device_type="cpu"), "precision": BF16, "scaler": None, "evaluation": None}
        assert found(trace(training=training, **facts)) == {}

    def test_index_of_the_right_device(self):
        training = step("bfloat16", region("cuda:0", "bfloat16"))
        assert found(trace(training=training, precision=BF16, scaler=None, evaluation=None)) == {}

    def test_switched_off(self):
        finding = only(self.wrong(region("cpu", "float32", enabled=False)))
        assert (finding.code, finding.severity) == ("AMP103", ERROR)
        assert finding.evidence["reason"] == "switched-off"
        assert "torch switched it off, because autocast on cpu does not support float32 here" in finding.message

    def test_float32_asked_of_an_undeclared_region_is_doubtful(self):
        assert found(self.wrong(region("cpu", "float32", enabled=False), precision=UNDECLARED)) == {"AMP103": WARNING}

    def test_undeclared(self):
        assert found(self.wrong(region("cuda", enabled=False), precision=UNDECLARED)) == {"AMP103": ERROR}

    def test_float32_declared(self):
        assert found(self.wrong(region("cuda", enabled=False), precision=TRUE32)) == {"AMP103": WARNING}
        default = dataclasses.replace(TRUE32, explicit=False)
        assert found(self.wrong(region("cuda", enabled=False), precision=default)) == {"AMP103": ERROR}

    def test_the_same_line_entered_twice_is_one_finding(self):
        again = region("cuda", enabled=False, index=1)
        assert found(self.wrong(region("cuda", enabled=False), again)) == {"AMP103": ERROR}

    def test_region_with_enabled_false_is_no_wish(self):
        assert found(self.wrong(region("cuda", enabled=False, requested=False))) == {"AMP101": ERROR}
        assert found(self.wrong(region("cuda", enabled=False, requested=False), precision=UNDECLARED)) == {}
        assert found(self.wrong(region("cuda", enabled=False, requested=None), precision=UNDECLARED)) == {}

    def test_region_that_merely_also_exists(self):
        outer, inner = region("cpu", "bfloat16"), region("cuda", index=1, enabled=False, outer=0)
        on = calls("bfloat16", 0, device_type="cpu")
        training = step("bfloat16", outer, inner, calls=(*on, call("stem", "bfloat16", 1, device_type="cpu")))
        facts = {"model": model(device_type="cpu"), "precision": BF16, "scaler": None, "evaluation": None}
        assert found(trace(training=training, **facts)) == {}

    def test_the_right_region_was_entered_before_the_watch_began(self):
        on = (*calls("bfloat16", None, device_type="cpu"), call("stem", "bfloat16", 0, device_type="cpu"))
        training = step("bfloat16", region("cuda", enabled=False), calls=on)
        facts = {"model": model(device_type="cpu"), "precision": BF16, "scaler": None, "evaluation": None}
        assert found(trace(training=training, **facts)) == {}

    def test_region_around_a_small_part(self):
        small = (*calls(None, None, device_type="cpu"), call("head.norm", None, 0, device_type="cpu"))
        training = off(region("cuda", enabled=False), calls=small)
        facts = {"model": model(device_type="cpu"), "scaler": None, "evaluation": None, "training": training}
        assert found(trace(precision=UNDECLARED, **facts)) == {"AMP103": WARNING}
        assert found(trace(precision=BF16, **facts)) == {"AMP101": ERROR}


class TestAutocastDtypeDiffers:
    def test_differs(self):
        finding = only(trace(precision=BF16, evaluation=None))
        assert (finding.code, finding.severity) == ("AMP104", ERROR)
        assert finding.message == (
            "bfloat16 was asked for by --amp --amp-dtype bfloat16, but 3 module calls of the training step ran under "
            "autocast float16: stem, head and Net."
        )
        assert finding.sites == (site(),)

    def test_as_asked(self):
        assert found(trace(precision=BF16, scaler=None, training=step("bfloat16"), evaluation=None)) == {}

    def test_documented_substitute_is_information(self):
        precision = dataclasses.replace(FP16, effective_dtype="bfloat16", scaler=False)
        finding = only(trace(precision=precision, scaler=None, training=step("bfloat16"), evaluation=None))
        assert (finding.code, finding.severity) == ("AMP104", INFO)
        named = only(
            trace(precision=precision, scaler=None, training=step("bfloat16"), evaluation=None, host=Host("rig", "1"))
        )
        assert "which rig uses instead" in named.message

    def test_partly_in_another_dtype_is_doubtful(self):
        inner = region(dtype="bfloat16", index=1, outer=0, line=30)
        training = step("float16", region(), inner, calls=(*calls("float16"), call("head.norm", "bfloat16", 1)))
        finding = only(trace(training=training, evaluation=None))
        assert (finding.code, finding.severity) == ("AMP104", WARNING)
        assert finding.sites == (site(30),)

    def test_float32_island(self):
        inner = region(dtype="float32", index=1, outer=0)
        training = step("float16", region(), inner, calls=(*calls("float16"), call("head.norm", "float32", 1)))
        assert found(trace(training=training, evaluation=None)) == {}

    def test_all_in_float32(self):
        assert found(trace(training=step("float32"), evaluation=None)) == {"AMP104": ERROR}

    @pytest.mark.parametrize("precision", [UNDECLARED, Precision("mixed", "cuda")], ids=["undeclared", "no dtype"])
    def test_nothing_to_compare_with(self, precision):
        assert found(trace(precision=precision)) == {}


class TestTrainEvalMismatch:
    def test_evaluation_with_autocast_off(self):
        finding = only(trace(evaluation=off()))
        assert (finding.code, finding.severity) == ("AMP105", WARNING)
        assert finding.message == (
            "3 of the 3 modules that ran in both ran under autocast float16 in training and under no autocast in "
            "evaluation: stem, head and the model itself."
        )

    def test_the_hosts_own_default_is_information(self):
        precision = dataclasses.replace(FP16, evaluation_dtype="float32")
        assert found(trace(precision=precision, evaluation=off())) == {"AMP105": INFO}
        assert found(trace(precision=precision, evaluation=step("bfloat16"))) == {"AMP105": WARNING}

    def test_other_dtype(self):
        assert found(trace(evaluation=step("bfloat16"))) == {"AMP105": WARNING}

    def test_both_off(self):
        assert found(trace(precision=TRUE32, scaler=None, training=off(), evaluation=off())) == {}

    def test_modules_that_ran_in_one_of_the_two_are_not_compared(self):
        evaluation = step("float16", calls=(*calls("float16"), call("decode", None)))
        assert found(trace(evaluation=evaluation)) == {}

    def test_evaluation_without_gradients_in_the_same_setting(self):
        assert found(trace(evaluation=step("float16", calls=calls("float16", grad=False)))) == {}

    def test_copy_in_other_dtypes(self):
        half = model(dict.fromkeys(["stem.weight", "stem.bias", "head.weight"], "float16"))
        finding = only(trace(evaluation=dataclasses.replace(step(), model=half)))
        assert (finding.code, finding.severity) == ("AMP105", WARNING)
        assert "3 of the 3 floating tensors of the model are float32 in training and float16 in the evaluated copy" in (
            finding.message
        )

    def test_copy_in_the_same_dtypes(self):
        assert found(trace(evaluation=dataclasses.replace(step(), model=model()))) == {}

    def test_no_evaluation_is_not_judged(self):
        assert found(trace(evaluation=None)) == {}


class TestAutocastAroundBackward:
    def test_inside(self):
        finding = only(trace(training=step(ops=(op("backward", count=2),))))
        assert (finding.code, finding.severity) == ("AMP106", WARNING)
        assert finding.message == "backward() was called 2 times under autocast float16 at train.py:20."

    def test_outside(self):
        assert found(trace(training=step(ops=(op("backward", dtype=None),)))) == {}


class TestPrecisionUnsupported:
    def test_in_force(self):
        facts = {"precision": BF16, "scaler": None, "evaluation": None, "environment": EMULATED}
        seen = only(trace(training=step("bfloat16"), **facts))
        assert (seen.code, seen.severity) == ("AMP107", WARNING)
        assert seen.fix.startswith("Use float16 with a gradient scaler, because this cuda device supports it natively")
        # What is said at fit start is not said again after the watched step.
        assert only(trace(training=None, **facts)) == seen

    @pytest.mark.parametrize(
        ("bfloat16", "fix"),
        [(True, "Use bfloat16, because this cpu device supports it"), (False, "Train in float32: this")],
    )
    def test_float16_on_a_cpu(self, bfloat16, fix):
        environment = Environment("2.15.0", {("cpu", "float16"): False, ("cpu", "bfloat16"): bfloat16})
        on_cpu = dataclasses.replace(model(NET), device_type="cpu")
        seen = only(trace(model=on_cpu, training=None, evaluation=None, environment=environment))
        assert seen.code == "AMP107"
        assert seen.fix.startswith(fix)

    def test_native_or_unknown(self):
        assert found(trace(environment=EMULATED)) == {}
        assert found(trace(precision=BF16, scaler=None, training=step("bfloat16"), evaluation=None)) == {}

    def test_whole_model_in_the_dtype(self):
        precision = Precision("true", "cuda", "bfloat16")
        facts = {"scaler": None, "training": off(), "evaluation": None, "environment": EMULATED}
        assert found(trace(precision=precision, model=model(dict.fromkeys(["a", "b"], "bfloat16")), **facts)) == {
            "AMP107": WARNING
        }


class TestDeprecatedAmpApi:
    def test_region(self):
        entered = region(deprecated=OLD), region(deprecated=OLD, index=1, line=30)
        finding = only(trace(training=step("float16", *entered)))
        assert (finding.code, finding.severity) == ("AMP108", INFO)
        assert finding.message == "The deprecated torch.cuda.amp.autocast was entered at train.py:12 and 1 other line."

    def test_new_spelling(self):
        assert found(trace(training=step("float16", region()))) == {}

    def test_region_of_a_library(self):
        assert found(trace(training=step("float16", region(deprecated=OLD, by_user=False)))) == {}

    def test_scaler(self):
        old = dataclasses.replace(SCALER, deprecated="torch.cuda.amp.GradScaler")
        assert found(trace(scaler=old)) == {"AMP108": INFO}
        assert found(trace(scaler=old, host=Host("rig", "1"))) == {}


class TestAutocastCacheUnderNoGrad:
    def test_without_gradients_first(self):
        finding = only(trace(training=twice(False, True), environment=FAULTY))
        assert (finding.code, finding.severity) == ("AMP109", ERROR)
        assert finding.message.startswith("The weights of 2 modules get no gradient: stem and head ran")
        assert finding.sites == (site(),)

    def test_version_without_the_fault(self):
        assert found(trace(training=twice(False, True))) == {}

    @pytest.mark.parametrize("order", [(True, False), (True, False, True), (True, True), (False, False)])
    def test_other_orders(self, order):
        assert found(trace(training=twice(*order), environment=FAULTY, evaluation=None)) == {}

    def test_cache_off(self):
        assert found(trace(training=twice(False, True, cache=False), environment=FAULTY)) == {}

    def test_cache_cleared(self):
        training = dataclasses.replace(twice(False, True), cache_cleared=True)
        assert found(trace(training=training, environment=FAULTY)) == {}

    def test_regions_of_their_own(self):
        separate = (*calls("float16", 0, grad=False), *calls("float16", 1))
        training = step("float16", region(), region(index=1), calls=separate)
        assert found(trace(training=training, environment=FAULTY)) == {}

    def test_nested_in_one_region(self):
        nested = (*calls("float16", 1, grad=False), *calls("float16", 2))
        regions = region(), region(index=1, outer=0), region(index=2, outer=0)
        training = step("float16", *regions, calls=nested)
        assert found(trace(training=training, environment=FAULTY)) == {"AMP109": ERROR}

    def test_modules_whose_weights_autocast_does_not_cast(self):
        norms = model({"stem.bias": "float32", "head.bias": "float32"})
        facts = {"environment": FAULTY, "optimizers": ()}
        assert found(trace(training=twice(False, True), model=norms, **facts)) == {}
        one = model({"stem.bias": "float32", "head.weight": "float32"})
        assert only(trace(training=twice(False, True), model=one, **facts)).module == "head"
        embedding = tuple(dataclasses.replace(call("head", grad=grad), outputs=("float32",)) for grad in (False, True))
        assert found(trace(training=step(calls=embedding), **facts)) == {}

    def test_frozen_parameters(self):
        frozen = model(frozen=("stem.weight", "stem.bias", "head.weight"))
        training = twice(False, True)
        assert found(trace(training=training, model=frozen, environment=FAULTY)) == {}


class TestModuleOutsideAutocast:
    def test_turned_off_by_a_region(self):
        inner = region(index=1, enabled=False, requested=False, outer=0, line=30)
        head = call("head", None, 1), call("head.norm", None, 1, count=4), call("head.drop", None, 1)
        training = step("float16", region(), inner, calls=(call("stem"), *head, call("")))
        finding = only(trace(training=training, evaluation=None))
        assert (finding.code, finding.severity, finding.module) == ("AMP110", INFO, "head")
        assert finding.message == (
            "6 module calls ran with autocast turned off at train.py:30, while 2 ran under autocast float16: head."
        )
        assert finding.sites == (site(30),)

    def test_outside_every_region(self):
        loss = call(None, None, None, kind="CrossEntropyLoss")
        finding = only(trace(training=step(calls=(*calls("float16"), loss)), evaluation=None))
        assert (finding.code, finding.module) == ("AMP110", None)
        assert "outside every region that turns it on" in finding.message
        assert "CrossEntropyLoss" in finding.message

    def test_one_line_entered_often_is_one_finding(self):
        regions = region(), *(region(index=i, enabled=False, requested=False, outer=0, line=30) for i in (1, 2))
        norms = tuple(call(f"norm{i}", None, i) for i in (1, 2))
        training = step("float16", *regions, calls=(*calls("float16"), *norms))
        assert found(trace(training=training, evaluation=None)) == {"AMP110": INFO}

    def test_modules_around_the_region_are_not_outside(self):
        training = step(calls=(call("net.stem"), call("net", None, None, leaf=False), call("", None, None, leaf=False)))
        assert found(trace(training=training, evaluation=None)) == {}

    def test_what_backward_repeats_and_what_needs_no_gradient(self):
        aside = call("stem", None, None, backward=True), call(None, None, None, grad=False, kind="Accuracy")
        assert found(trace(training=step(calls=(*calls("float16"), *aside)))) == {}

    def test_all_off(self):
        assert found(trace(precision=TRUE32, scaler=None, training=off(), evaluation=None)) == {}


def test_disabled_scaler_asks_for_nothing():
    disabled = ScalerInfo("GradScaler", False, "cuda")
    assert found(trace(precision=UNDECLARED, scaler=disabled, training=off(), evaluation=off())) == {}


@pytest.mark.parametrize("code", ["AMP106", "AMP109", "AMP110", "AMP208", "AMP210"])
def test_what_runs_inside_compiled_code_is_not_judged(code):
    from ampcheck.rules import RULES

    (rule,) = (rule for rule in RULES if rule.code == code)
    assert rule.missing(trace(model=model(compiled=True))) is not None
    assert rule.missing(trace()) is None
