"""AMP601 to AMP605 on hand-built comparisons and failures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
from rules.traces import ERROR, WARNING, findings, found, model, only

from ampcheck.rules import RULES
from ampcheck.rules.judging import judge
from ampcheck.trace import (
    BakedConstant,
    CapturedCasts,
    Cause,
    Comparison,
    Export,
    ExportFailure,
    ExportFault,
    ModuleError,
    OpaqueCall,
    OutputError,
    Site,
    Tolerance,
    Trace,
)

LINE = Site("/work/model.py", 40, "forward", "if x.mean() > 0:", module="gate")
CLOSE = OutputError("output", "float32", (8, 10), 2e-7, 1e-7, True, "fresh values")
APART = OutputError("logits", "float32", (8, 10), 0.5, 0.25, False, "fresh values")
AGREES = ModuleError("stem", "Conv2d", 0, "float32", 0.0, 0.0, True, True)
DIFFERS = ModuleError("gate", "Gate", 0, "float32", 0.5, 0.25, False, True)
BRANCH = Cause("data-dependent", "gate", "is True on the example and False on fresh values", (LINE,))
CONSTANT = BakedConstant("attention", "float32", (8, 64), LINE, "extension:deform_forward")
OPAQUE = OpaqueCall("python", "round_", "head", LINE)
CASTS = CapturedCasts("float16", "head", 2, LINE)

DIED = ExportFailure(
    "torch.export.export",
    "GuardOnDataDependentSymNode",
    "Could not guard on data-dependent expression Eq(u0, 1)",
    "data-dependent-branch",
    sites=(LINE,),
)

VERDICT = (
    "1 output of the TorchScript trace differs from the eager model's (largest absolute error 0.5, relative 0.25, on "
    "fresh values)."
)


def compared(*outputs: OutputError, **facts: Any) -> Trace:
    """A model and its trace, which agree but for ``facts``."""
    faithful: dict[str, Any] = {
        "first": "eager",
        "second": "TorchScript trace",
        "outputs": outputs or (CLOSE,),
        "tolerances": (Tolerance("float32", 1e-4, 1e-5, "torch.jit.trace"),),
        "inputs": ("the example", "fresh values"),
        "modules": (AGREES,),
    }
    return Trace(model=model(), comparison=Comparison(**{**faithful, **facts}))


PAIRS = (
    ("AMP601", compared(APART, modules=(AGREES, DIFFERS)), compared(modules=(AGREES,))),
    ("AMP602", compared(constants=(CONSTANT,)), compared(opaque=(OPAQUE,))),
    ("AMP603", compared(opaque=(OPAQUE,)), compared(constants=(CONSTANT,))),
    ("AMP604", compared(casts=(CASTS,)), compared(opaque=(OPAQUE,))),
    ("AMP605", Trace(export_failure=DIED), Trace(export_failure=dataclasses.replace(DIED, fault=None))),
)


def test_a_faithful_export_has_no_findings():
    assert found(compared()) == {}


@pytest.mark.parametrize("code", ["AMP601", "AMP602", "AMP603", "AMP604"])
def test_what_was_not_compared_is_not_judged(code):
    (rule,) = (rule for rule in RULES if rule.code == code)
    assert rule.missing(Trace(model=model())) == "comparison"
    assert rule.missing(compared()) is None


class TestExportDiffers:
    def test_first_module_that_differs(self):
        finding = only(compared(APART, modules=(AGREES, DIFFERS)))
        assert (finding.code, finding.severity, finding.module) == ("AMP601", ERROR, "gate")
        assert finding.message == f"{VERDICT} The first module whose output differs is gate."
        assert finding.sites == ()
        assert finding.evidence == {
            "reason": "unknown",
            "format": "TorchScript trace",
            "first_module": "gate",
            "outputs": {"logits": {"absolute": 0.5, "relative": 0.25}},
        }
        assert finding.fix.startswith("Check the code of the named module, outside its submodules")

    def test_the_worst_output_is_told(self):
        worse = dataclasses.replace(APART, output="boxes", relative=0.75, inputs="other values")
        message = only(compared(APART, worse, CLOSE)).message
        assert message.startswith("2 outputs of the TorchScript trace differ from the eager model's")
        assert "relative 0.75, on other values" in message

    def test_module_that_is_given_something_else(self):
        fed = dataclasses.replace(DIFFERS, module="net.head", inputs_equal=False)
        around = dataclasses.replace(DIFFERS, module="net")
        finding = only(compared(APART, modules=(AGREES, fed, around)))
        assert finding.module == "net"
        assert finding.message.endswith(
            " The first module whose output differs is net.head. Its inputs differ already, so the cause is in the "
            "code of net itself."
        )
        assert only(compared(APART, modules=(AGREES, fed))).message.endswith("is in the code of the model itself.")

    def test_modules_that_could_not_be_compared(self):
        finding = only(compared(APART, modules=(), unseen="the names are lost"))
        assert (finding.module, finding.evidence["first_module"]) == (None, None)
        assert finding.message == f"{VERDICT} The module is not known: the names are lost."
        assert only(compared(APART, modules=())).message == VERDICT

    def test_values_that_are_not_finite(self):
        apart = dataclasses.replace(APART, absolute=math.inf, relative=math.inf)
        assert only(compared(apart)).evidence["outputs"] == {"logits": {"absolute": None, "relative": None}}

    def test_settings_of_a_model_that_differ(self):
        assert found(compared(APART, modules=(DIFFERS,), causes=(BRANCH,), export=False)) == {}

    def test_rounding_is_amp604(self):
        assert found(compared(APART, modules=(DIFFERS,), rounding=(1e-3, 2e-3))) == {"AMP604": WARNING}

    def test_cause_that_is_known(self):
        finding = only(compared(APART, modules=(AGREES, DIFFERS), causes=(BRANCH,)))
        assert (finding.code, finding.severity, finding.module) == ("AMP601", ERROR, "gate")
        assert finding.message == (
            "A Python value is read from a tensor at model.py:40, in gate: it is True on the example and False on "
            "fresh values. The TorchScript trace always uses one of its values. "
            f"{VERDICT} The first module whose output differs is gate."
        )
        assert finding.sites == (LINE,)
        assert finding.evidence["reason"] == "data-dependent"
        assert finding.evidence["detail"] == BRANCH.detail
        assert finding.fix.startswith("Replace the branch with `torch.where(...)`")

    def test_cause_that_made_no_difference_yet(self):
        finding = only(compared(causes=(BRANCH,)))
        assert finding.severity == ERROR
        assert finding.message.endswith("always uses one of its values.")

    def test_doubtful_cause_explains_nothing(self):
        doubtful = dataclasses.replace(BRANCH, certain=False)
        assert only(compared(causes=(doubtful,))).severity == WARNING
        seen = findings(compared(APART, causes=(doubtful,)))
        assert [(finding.severity, finding.evidence["reason"]) for finding in seen] == [
            (WARNING, "data-dependent"),
            (ERROR, "unknown"),
        ]

    def test_the_verdict_is_told_once(self):
        dropout = Cause("training-mode", "head", "dropout", (LINE,))
        doubtful = dataclasses.replace(dropout, certain=False)
        seen = findings(compared(APART, causes=(BRANCH, doubtful, dropout)))
        assert [VERDICT in finding.message for finding in seen if finding.severity == ERROR] == [True, False]

    def test_model_itself_is_the_first_that_differs(self):
        finding = only(compared(APART, modules=(AGREES, dataclasses.replace(DIFFERS, module=""))))
        assert finding.message.endswith(" The first module whose output differs is the model itself.")
        assert finding.module == ""

    def test_cause_without_a_module_is_the_culprits(self):
        cause = Cause("frozen-shape", None, "on other sizes, 9×3 its outputs are others")
        assert only(compared(APART, modules=(DIFFERS,), causes=(cause,))).module == "gate"
        of_its_own = dataclasses.replace(cause, module="head")
        assert only(compared(APART, modules=(DIFFERS,), causes=(of_its_own,))).module == "head"

    @pytest.mark.parametrize(
        ("cause", "said", "fix"),
        [
            (
                Cause("frozen-shape", None, "on other sizes, 9×3 it stops: RuntimeError: size"),
                "The TorchScript trace is fixed to the sizes of its example: on other sizes, 9×3 it stops: "
                "RuntimeError: size.",
                "Read sizes from `x.shape`",
            ),
            (
                Cause("training-mode", "head.drop", "dropout", (LINE,)),
                "Dropout was left in training mode: in head.drop the TorchScript trace drops at random at model.py:40.",
                "Call `model.eval()` before the export, and export again.",
            ),
            (
                Cause("training-mode", "", "batch_norm"),
                "Batch norm was left in training mode: in the model the TorchScript trace normalizes by the "
                "statistics of each batch.",
                "Call `model.eval()` before the export, and export again.",
            ),
            (
                Cause("buffer-update", "head", "exported: head.seen, head.sum"),
                "Every call of the TorchScript trace updates head.seen and head.sum, and so did every call during the "
                "export: it starts from the values that the export left.",
                "Call `model.eval()` before the export; if `forward` must change a buffer",
            ),
            (
                Cause("buffer-update", "head", "eager: head.seen"),
                "Every call of the eager model updates head.seen, but the TorchScript trace keeps the values of the "
                "export.",
                "Call `model.eval()` before the export; if `forward` must change a buffer",
            ),
            (
                Cause("state-differs", "head", "head.weight"),
                "head.weight is not the same in the TorchScript trace as in the eager model.",
                "Export again, from the weights",
            ),
            (
                Cause("state-differs", "head", "head.weight, head.bias"),
                "head.weight and head.bias are not the same in the TorchScript trace as in the eager model.",
                "Export again, from the weights",
            ),
            (
                Cause("left-dispatcher", "head", "float32[8, 64]", (LINE,)),
                "In head, code outside the dispatcher computes an activation (float32[8, 64]) at model.py:40.",
                "Compute it with tensor operations while exporting",
            ),
            (
                Cause("unsettled", None, "0.3 on fresh values", certain=False),
                "Rounding decides what the model returns, so some outputs cannot be compared: those of the "
                "TorchScript trace differ (relative error 0.3 on fresh values), and",
                "Compare on your own inputs (`fresh_inputs=`)",
            ),
            (
                Cause("raises", None, "RuntimeError: expected a CPU tensor"),
                "The TorchScript trace raises where the eager model does not: RuntimeError: expected a CPU tensor.",
                "Export on inputs of the same device",
            ),
        ],
        ids=lambda value: getattr(value, "reason", ""),
    )
    def test_causes_in_words(self, cause, said, fix):
        finding = only(compared(causes=(cause,)))
        assert finding.message.startswith(said)
        assert finding.fix.startswith(fix)
        assert finding.evidence["reason"] == cause.reason

    def test_export_that_does_not_run(self):
        stops = Cause("raises", None, "RuntimeError: device")
        finding = only(compared(causes=(stops,)))
        assert finding.severity == ERROR
        assert finding.message.endswith(
            " The TorchScript trace does not run on the inputs that the eager model runs on."
        )
        # Where it stops for a reason that is known, the reason is told alone.
        assert only(compared(APART, causes=(BRANCH, stops))).evidence["reason"] == "data-dependent"

    def test_constant_of_the_graph(self):
        after = dataclasses.replace(DIFFERS, inputs_equal=False)
        seen = {finding.code: finding for finding in findings(compared(APART, modules=(after,), constants=(CONSTANT,)))}
        assert seen.keys() == {"AMP601", "AMP602"}
        assert (seen["AMP601"].module, seen["AMP601"].evidence["reason"]) == ("attention", "baked-constant")
        assert seen["AMP601"].message.endswith(
            " The first module whose output differs is gate. Before it runs attention, whose result is a constant."
        )
        assert seen["AMP601"].fix == "Compute inside the graph what was frozen in it, and compare again."

    def test_first_module_that_is_the_constant(self):
        itself = dataclasses.replace(DIFFERS, module="attention", inputs_equal=None)
        seen = findings(compared(APART, modules=(itself,), constants=(CONSTANT,)))
        assert seen[0].message.endswith(" The first module whose output differs is attention.")

    def test_constant_that_comes_later(self):
        seen = findings(compared(APART, modules=(DIFFERS,), constants=(CONSTANT,)))
        assert seen[0].module == "gate"
        assert "Before it runs" not in seen[0].message


class TestConstantBakedIntoTrace:
    def test_function_that_is_known(self):
        finding = only(compared(constants=(CONSTANT,)))
        assert (finding.code, finding.severity, finding.module) == ("AMP602", ERROR, "attention")
        assert finding.message == (
            "The TorchScript trace holds an activation of attention (float32[8, 64]) as a constant. It is computed "
            "outside the dispatcher at model.py:40, and changes with the inputs."
        )
        assert finding.sites == (LINE,)
        assert {name: finding.evidence[name] for name in ("dtype", "shape", "target")} == {
            "dtype": "float32",
            "shape": [8, 64],
            "target": "extension:deform_forward",
        }
        assert finding.fix == (
            'Export under `with ampcheck.plain_kernels({"extension:deform_forward": plain}):`, where `plain` computes '
            "the same with tensor operations, or register it with `torch.library.custom_op`."
        )
        remedy = finding.evidence["remedy"]
        compile(remedy, "remedy", "exec")
        assert 'plain_kernels({"extension:deform_forward": deform_forward_plain})' in remedy

    def test_function_that_is_not_known(self):
        finding = only(compared(constants=(BakedConstant("", "float32", (8,), None),)))
        assert finding.message.startswith("The TorchScript trace holds an activation of the model (float32[8]) as a")
        assert "computed outside the dispatcher, and changes" in finding.message
        assert (finding.sites, finding.evidence["remedy"]) == ((), None)
        assert finding.fix == "Compute it with tensor operations instead of NumPy and Python numbers."

    def test_each_is_a_finding(self):
        assert [finding.code for finding in findings(compared(constants=(CONSTANT, CONSTANT)))] == ["AMP602"] * 2


class TestOpaqueCallInGraph:
    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("python", "a Python function"),
            ("autograd-function", "a custom autograd function"),
            ("no-schema", "an operator without a schema"),
        ],
    )
    def test_called(self, kind, words):
        finding = only(compared(opaque=(dataclasses.replace(OPAQUE, kind=kind),)))
        assert (finding.code, finding.severity, finding.module) == ("AMP603", WARNING, "head")
        assert finding.message == f"The TorchScript trace calls {words}, `round_`, in head at model.py:40."
        assert finding.sites == (LINE,)
        assert finding.evidence == {"kind": kind, "name": "round_", "modules": ["head"]}

    def test_calls_of_one_function_are_one_finding(self):
        finding = only(compared(opaque=(OPAQUE, dataclasses.replace(OPAQUE, module="stem", site=None))))
        assert finding.message == (
            "The TorchScript trace calls a Python function, `round_`, in head at model.py:40 (2 calls)."
        )
        assert finding.evidence["modules"] == ["head", "stem"]

    @pytest.mark.parametrize("other", [{"name": "floor_"}, {"kind": "no-schema"}], ids=["name", "kind"])
    def test_others_are_others(self, other):
        seen = findings(compared(opaque=(OPAQUE, dataclasses.replace(OPAQUE, **other))))
        assert [finding.code for finding in seen] == ["AMP603", "AMP603"]

    def test_in_the_model_itself(self):
        assert only(compared(opaque=(OpaqueCall("python", "f", "", None),))).message.endswith("`f`, in the model.")


class TestAutocastCapturedInTrace:
    def test_casts(self):
        finding = only(compared(casts=(CASTS,)))
        assert (finding.code, finding.severity, finding.module) == ("AMP604", WARNING, "head")
        assert finding.message == (
            "The TorchScript trace makes 2 casts to float16 that the eager model does not make, in head: it was "
            "exported under autocast."
        )
        assert finding.sites == (LINE,)
        assert finding.evidence == {"dtype": "float16", "casts": {"head": 2}}
        assert finding.fix.startswith("Export outside the autocast region")

    def test_of_one_dtype_are_one_finding(self):
        line = dataclasses.replace(LINE, line=50)
        more = (dataclasses.replace(CASTS, module=name, count=1, site=line) for name in ("stem", ""))
        finding = only(compared(casts=(CASTS, *more)))
        assert "makes 4 casts to float16 that the eager model does not make, in head, stem and the model" in (
            finding.message
        )
        assert (finding.module, finding.sites) == (None, (LINE, line))

    def test_of_two_dtypes_are_two(self):
        seen = findings(compared(casts=(CASTS, dataclasses.replace(CASTS, dtype="bfloat16"))))
        assert [finding.evidence["dtype"] for finding in seen] == ["float16", "bfloat16"]

    def test_the_first_three_lines_are_named(self):
        casts = (dataclasses.replace(CASTS, site=dataclasses.replace(LINE, line=line)) for line in (4, 4, 3, 2, 1))
        assert [site.line for site in only(compared(casts=tuple(casts))).sites] == [4, 3, 2]

    def test_rounding(self):
        finding = only(compared(APART, modules=(AGREES, DIFFERS), rounding=(1e-3, 2e-3)))
        assert (finding.code, finding.severity, finding.module) == ("AMP604", WARNING, "gate")
        assert finding.message == (
            "The TorchScript trace rounds differently from the eager model, and nothing else differs (relative errors "
            "against float32: 0.002 exported, 0.001 eager)."
        )
        assert finding.evidence == {"relative_exported": 2e-3, "relative_eager": 1e-3}
        assert finding.fix.startswith("Export in float32, or keep the normalization")


class TestExportFailed:
    def test_a_branch(self):
        finding = only(Trace(export_failure=DIED))
        assert (finding.code, finding.severity, finding.sites) == ("AMP605", ERROR, (LINE,))
        assert finding.message == (
            "Which branch is taken depends on the values of a tensor at model.py:40. `torch.export.export` stopped "
            "there: Could not guard on data-dependent expression Eq(u0, 1)."
        )
        assert finding.evidence == {"reason": "data-dependent-branch", "detail": "", "handled": False}

    def test_a_failure_that_the_program_handles_is_a_warning(self):
        assert only(Trace(export_failure=dataclasses.replace(DIED, handled=True))).severity == WARNING

    def test_every_cause_has_a_sentence_and_a_fix(self):
        faults = get_args(ExportFault)
        told = [only(Trace(export_failure=dataclasses.replace(DIED, fault=fault, detail="17"))) for fault in faults]
        assert len({finding.message for finding in told}) == len({finding.fix for finding in told}) == len(faults)


def test_every_export_of_a_run_is_judged_with_its_own_line():
    line = Site("/work/train.py", 12, "main", "torch.jit.trace(model, x)", op="torch.jit.trace")
    branch = compared(APART, causes=(BRANCH,)).comparison
    exports = (
        Export("torch.jit.trace", "Net", line, comparison=branch),
        Export("torch.jit.trace", "Net", line, comparison=compared().comparison),
        Export("torch.export.export", "Net", failure=DIED),
    )
    first, second = judge(Trace(exports=exports), RULES)[0]
    assert (first.code, first.sites) == ("AMP601", (LINE, line))
    assert (second.code, second.sites) == ("AMP605", (LINE,))
