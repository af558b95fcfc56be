"""The text and the JSON form, on traces built by hand: exact."""

from __future__ import annotations

import json
import os

import pytest

from ampcheck import Evidence, Finding, Host, Precision, Report, Severity, Site, Trace
from ampcheck.report.text import fit_line, render_finding, step_line
from ampcheck.trace import (
    AutocastState,
    Environment,
    Failure,
    ModelInfo,
    ModuleCall,
    ModuleInfo,
    StepTrace,
    TensorInfo,
)

FP16 = Precision("mixed", "cuda", "float16", True, "Trainer(precision='16-mixed')")
ON, OFF = AutocastState("cuda", True, "float16"), AutocastState("cuda", False, "float16")


def model(*sizes, dtype="float32", modules=1):
    tensors = tuple(TensorInfo(f"w{i}", dtype, (size,), "cuda", True) for i, size in enumerate(sizes))
    return ModelInfo("Net", "cuda", tuple(ModuleInfo(f"m{i}", "Linear") for i in range(modules)), tensors)


def call(state, count=1, *, module="head", **more):
    return ModuleCall(module, "Linear", state, None, True, False, ("float32",), ("float16",), count, **more)


def finding(severity=Severity.ERROR, code="AMP401", **more):
    return Finding(code, "saved-tensor-modified", severity, "the output of relu was modified in place", **more)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "model.py")


def test_the_designs_block(source):
    sites = (
        Site(source, 41, "forward", "x = F.dropout(x, self.p, inplace=True)", "write", "head", op="aten::mul_"),
        Site(
            source, 40, "forward", "x = F.relu(self.norm(x))", "save", "head.act", node="ReluBackward0", slot="result"
        ),
    )
    found = finding(sites=sites, fix="Drop `inplace=True` at model.py:41.", host_fix="Give `drop_rate=...`.")
    trace = Trace(host=Host("timm", "1.0"))
    assert render_finding(found, trace).plain.splitlines() == [
        "error[AMP401] saved-tensor-modified: the output of relu was modified in place",
        "   model.py",
        "   40 │ x = F.relu(self.norm(x))",
        "      │     saved here by ReluBackward0 as `result` in head.act",
        "   41 │ x = F.dropout(x, self.p, inplace=True)",
        "      │     written here by aten::mul_ in head",
        "   fix   Drop `inplace=True` at model.py:41.",
        "   timm  Give `drop_rate=...`.",
        "   more  ampcheck explain AMP401",
    ]


def test_block_without_host_sites_and_fix():
    assert render_finding(finding(host_fix="not shown"), Trace()).plain.splitlines() == [
        "error[AMP401] saved-tensor-modified: the output of relu was modified in place",
        "   more  ampcheck explain AMP401",
    ]


def test_lines_of_a_block_are_aligned_and_files_apart(source):
    sites = (
        Site(source, 9, "forward", "a", "call"),
        Site("/elsewhere/lib.py", 7, "inner", "", "raise"),
        Site(source, 120, "main", "b", "cast"),
    )
    assert render_finding(finding(sites=sites), Trace()).plain.splitlines()[1:-1] == [
        "   model.py",
        "     9 │ a",
        "       │     here in forward",
        "   120 │ b",
        "       │     cast here in main",
        "   /elsewhere/lib.py",
        "   7 │ (source not available)",
        "     │     raised here in inner",
    ]


@pytest.mark.parametrize("host", ["ultralytics", "lightning"])
def test_long_host_names(host):
    lines = render_finding(finding(host_fix="Set it."), Trace(host=Host(host, "1"))).plain.splitlines()
    assert f"   {host} Set it." in lines


def test_fit_line_when_all_is_well():
    trace = Trace(precision=FP16, model=model(23_500_000, modules=161))
    assert fit_line(trace, ()).plain == (
        "ampcheck  mixed float16 on cuda, loss scaling on · 23.5 M parameters float32 · 161 modules · no findings"
    )


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((), "no parameters"),
        ((1,), "1 parameter float32"),
        ((999,), "999 parameters float32"),
        ((1000,), "1.0 k parameters float32"),
        ((1500, 500), "2.0 k parameters float32"),
        ((7 * 10**9,), "7.0 B parameters float32"),
    ],
)
def test_parameters_are_counted(sizes, text):
    assert fit_line(Trace(model=model(*sizes)), ()).plain == (
        f"ampcheck  precision not declared · {text} · 1 module · no findings"
    )


def test_parameters_of_several_dtypes():
    tensors = (TensorInfo("a", "float32", (10, 10), "cpu"), TensorInfo("b", "bfloat16", (3,), "cpu"))
    trace = Trace(precision=Precision("true", "cpu", "float32"), model=ModelInfo("Net", "cpu", (), tensors))
    assert fit_line(trace, ()).plain == (
        "ampcheck  true float32 on cpu · 100 parameters float32, 3 bfloat16 · 0 modules · no findings"
    )


@pytest.mark.parametrize(
    ("severities", "text"),
    [
        ([], "no findings"),
        ([Severity.ERROR], "1 error"),
        ([Severity.WARNING, Severity.ERROR, Severity.WARNING], "1 error, 2 warnings"),
        ([Severity.INFO], "1 info"),
    ],
)
def test_findings_are_counted(severities, text):
    findings = [finding(severity) for severity in severities]
    assert fit_line(Trace(), findings).plain == f"ampcheck  precision not declared · {text}"


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (StepTrace((call(ON, 158), call(OFF, 3))), "step · 161 module calls, 158 under autocast float16, 3 outside"),
        (StepTrace((call(ON),)), "step · 1 module call, 1 under autocast float16"),
        (StepTrace((call(OFF, 2),)), "step · 2 module calls, none under autocast"),
        (StepTrace((call(ON, 4),), steps=2), "steps · 4 module calls, 4 under autocast float16"),
        (StepTrace(), "step · 0 module calls, none under autocast"),
        (
            StepTrace((call(ON, 2), call(ON._replace(dtype="bfloat16"), 5))),
            "step · 7 module calls, 5 under autocast bfloat16, 2 under autocast float16",
        ),
    ],
)
def test_step_line(step, text):
    number = f"{step.steps} " if step.steps > 1 else ""
    assert step_line("training", step, ()).plain == f"ampcheck  watched {number}training {text} · no findings"


def test_whole_report():
    trace = Trace(precision=FP16, model=model(10), training=StepTrace((call(ON),)), evaluation=StepTrace((call(OFF),)))
    report = Report(trace, (finding(Severity.INFO),), {"AMP109": "it is compiled", "AMP110": "it is compiled"})
    assert str(report).splitlines() == [
        "ampcheck  mixed float16 on cuda, loss scaling on · 10 parameters float32 · 1 module · 1 info",
        "ampcheck  watched training step · 1 module call, 1 under autocast float16",
        "ampcheck  watched evaluation step · 1 module call, none under autocast",
        "info[AMP401] saved-tensor-modified: the output of relu was modified in place",
        "   more  ampcheck explain AMP401",
        "ampcheck  not judged: AMP109, AMP110 (it is compiled)",
    ]


def test_findings_come_most_severe_first():
    from ampcheck import rule
    from ampcheck.rules.judging import judge

    def make(code, severity):
        def some_rule(trace):
            yield Evidence("seen")

        return rule(code, severity, fix="")(some_rule)

    rules = [make("AMP003", Severity.INFO), make("AMP002", Severity.ERROR), make("AMP001", Severity.ERROR)]
    findings, _ = judge(Trace(), [*rules, make("AMP000", Severity.WARNING)])
    assert [found.code for found in findings] == ["AMP001", "AMP002", "AMP000", "AMP003"]


def test_short_paths(source, tmp_path):
    lines = render_finding(finding(sites=(Site(source, 1, "f"), Site("/a.py", 1, "g"))), Trace()).plain.splitlines()
    assert lines[1] == "   model.py"
    assert "   /a.py" in lines


def test_json(source):
    site = Site(source, 40, "forward", "x = relu(x)", "save", "head.act", node="ReluBackward0", slot="result")
    found = finding(module="head", sites=(site, Site("/a.py", 1, "g")), evidence={"dtype": "float16"}, fix="Drop it.")
    trace = Trace(
        precision=FP16,
        environment=Environment("2.15.0"),
        host=Host("lightning", "2.6.6"),
        model=ModelInfo("Net", "cuda", (ModuleInfo("head", "Linear", {"float32": 2}, {}), ModuleInfo("other", "ReLU"))),
        training=StepTrace((call(ON, 2), call(OFF, 1), call(OFF, 9)._replace() if False else call(ON, 1, module=None))),
        failure=Failure("RuntimeError", "message", "backward", 0),
    )
    values = json.loads(json.dumps(Report(trace, (found,), {"AMP105": "no evaluation step was watched"}).to_dict()))
    assert values.pop("ampcheck")
    assert values == {
        "schema": "ampcheck/1",
        "torch": "2.15.0",
        "host": {"name": "lightning", "version": "2.6.6"},
        "precision": {
            "mode": "mixed", "device_type": "cuda", "dtype": "float16", "scaler": True,
            "source": "Trainer(precision='16-mixed')",
        },
        "findings": [
            {
                "code": "AMP401", "name": "saved-tensor-modified", "severity": "error",
                "message": "the output of relu was modified in place", "module": "head",
                "sites": [
                    {
                        "role": "save", "file": "model.py", "line": 40, "function": "forward", "code": "x = relu(x)",
                        "module": "head.act", "node": "ReluBackward0", "slot": "result",
                    },
                    {"role": "call", "file": "/a.py", "line": 1, "function": "g", "code": ""},
                ],
                "evidence": {"dtype": "float16"}, "fix": "Drop it.", "host_fix": None,
            }
        ],
        "not_judged": [{"code": "AMP105", "reason": "no evaluation step was watched"}],
        "failure": {"type": "RuntimeError", "message": "message", "phase": "backward", "step": 0},
        "modules": [
            {
                "name": "head", "type": "Linear", "parameters": {"float32": 2}, "buffers": {}, "calls": 3,
                "autocast": "float16", "inputs": ["float32"], "outputs": ["float16"],
            },
            {
                "name": "other", "type": "ReLU", "parameters": {}, "buffers": {}, "calls": 0, "autocast": None,
                "inputs": [], "outputs": [],
            },
        ],
    }  # fmt: skip


def test_write_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "made" / "report.json"
    Report(Trace()).write(path)
    first = path.read_text()
    assert json.loads(first)["schema"] == "ampcheck/1"

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Report(Trace(), (finding(),)).write(path)
    assert path.read_text() == first
    assert os.listdir(path.parent) == ["report.json"]


def test_values_that_json_does_not_know_are_spelled(tmp_path):
    Report(Trace(), (finding(evidence={"path": tmp_path}),)).write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["findings"][0]["evidence"] == {"path": str(tmp_path)}
