"""What goes wrong in an export, and what is said of it."""

from __future__ import annotations

import inspect

import pytest
import torch
from export_forms import exported
from faulty import (
    Between,
    Counting,
    FrozenShape,
    Gate,
    ListTanh,
    Mean,
    Net,
    NumpyTanh,
    RareGate,
    Scale,
    TorchTanh,
    WhereGate,
)
from torch import nn

import ampcheck

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def traced(model: nn.Module, x: torch.Tensor = X) -> torch.jit.ScriptModule:
    return exported(model, (x,), "trace", None)


def found(report: ampcheck.Report) -> dict[str, ampcheck.Finding]:
    return {finding.code: finding for finding in report.findings}


def reasons(report: ampcheck.Report) -> list[str]:
    return [finding.evidence["reason"] for finding in report.findings if finding.code == "AMP601"]


def marked(kind: type, text: str) -> int:
    lines, start = inspect.getsourcelines(kind)
    return next(start + offset for offset, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("kind", [NumpyTanh, ListTanh])
@pytest.mark.parametrize("saved", [False, True])
def test_a_module_that_leaves_the_dispatcher_is_named_with_its_line(kind, saved, tmp_path):
    model = Net(kind()).eval()
    export = traced(model)
    if saved:
        torch.jit.save(export, str(tmp_path / "model.pt"))
        export = tmp_path / "model.pt"
    findings = found(ampcheck.compare(model, export, X))
    assert set(findings) == {"AMP601", "AMP602"}
    baked = findings["AMP602"]
    assert baked.module == "body.1"
    (site,) = baked.sites
    assert (site.line, site.module) == (marked(kind, "# leaves the dispatcher"), "body.1")
    assert site.file == inspect.getsourcefile(kind)
    assert findings["AMP601"].module == "body.1"
    assert findings["AMP601"].evidence["first_module"] == "body.1"


def test_its_twin_in_tensor_operations_is_not():
    model = Net(TorchTanh()).eval()
    report = ampcheck.compare(model, traced(model), X)
    assert report.findings == ()
    assert report.comparison.equal


def test_an_example_other_than_the_traced_one():
    model = Net(NumpyTanh()).eval()
    assert set(found(ampcheck.compare(model, traced(model), torch.randn(3, 6)))) == {"AMP601", "AMP602"}


def test_code_between_submodules_is_told_from_the_submodule_after_it():
    model = Net(Between()).eval()
    report = ampcheck.compare(model, traced(model), X)
    finding = found(report)["AMP601"]
    assert report.comparison.first_module.module == "body.1.after"
    assert finding.module == "body.1"
    assert finding.evidence["first_module"] == "body.1.after"
    assert found(report)["AMP602"].module == "body.1"


def test_a_branch_on_data():
    model = Net(Gate()).eval()
    report = ampcheck.compare(model, traced(model), X)
    (finding,) = report.findings
    assert (finding.code, finding.module, reasons(report)) == ("AMP601", "body.1", ["data-dependent"])
    assert finding.severity is ampcheck.Severity.ERROR
    assert [site.line for site in finding.sites] == [marked(Gate, "decides")]
    assert "another branch" in finding.message


@pytest.mark.parametrize("form", ["trace", "script"])
def test_a_branch_that_is_in_the_graph(form, tmp_path):
    model = Net(WhereGate() if form == "trace" else Gate()).eval()
    assert ampcheck.compare(model, exported(model, (X,), form, tmp_path), X).findings == ()


def test_a_branch_that_was_never_taken_is_a_warning():
    model = Net(RareGate()).eval()
    (finding,) = ampcheck.compare(model, traced(model), X).findings
    assert (finding.severity, finding.evidence["reason"]) == (ampcheck.Severity.WARNING, "data-dependent")
    assert [site.line for site in finding.sites] == [marked(RareGate, "decides")]


def test_a_number_read_from_an_activation():
    model = Net(Scale()).eval()
    report = ampcheck.compare(model, traced(model), X)
    assert "data-dependent" in reasons(report)
    assert found(report)["AMP601"].sites[0].line == marked(Scale, "frozen")


@pytest.mark.parametrize(("claimed", "severity"), [(None, "warning"), (True, "error"), (False, None)])
def test_a_frozen_shape(claimed, severity):
    model = Net(FrozenShape()).eval()
    report = ampcheck.compare(model, traced(model), X, dynamic_batch=claimed)
    if severity is None:
        assert report.findings == ()
    else:
        (finding,) = report.findings
        assert (str(finding.severity), finding.evidence["reason"]) == (severity, "frozen-shape")
        assert finding.module == "body.1"


def test_a_trace_under_autocast():
    model = Net(TorchTanh()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export = traced(model)
    findings = found(ampcheck.compare(model, export, X))
    captured = findings["AMP604"]
    assert captured.severity is ampcheck.Severity.WARNING
    assert captured.evidence["dtype"] == "bfloat16"
    assert "body.0" in captured.evidence["casts"]


def test_a_half_precision_trace_that_sums_otherwise():
    model, other = Mean(False).bfloat16(), Mean(True).bfloat16()
    other.load_state_dict(model.state_dict())
    x = torch.rand(3, 400).bfloat16()
    (finding,) = ampcheck.compare(model, traced(other, x), x).findings
    assert finding.code == "AMP604"
    assert finding.evidence["relative_exported"] > finding.evidence["relative_eager"]
    assert "float32" in finding.message


def test_a_half_precision_trace_that_is_wrong():
    model = Net(Gate()).eval().bfloat16()
    assert "data-dependent" in reasons(ampcheck.compare(model, traced(model, X.bfloat16()), X.bfloat16()))


def test_casts_that_the_model_itself_makes_are_not_autocasts():
    class Half(nn.Module):
        def forward(self, x):
            return x.to(torch.bfloat16).float()

    model = Net(Half()).eval()
    assert ampcheck.compare(model, traced(model), X).findings == ()


@pytest.mark.parametrize("form", ["trace", "program"])
def test_dropout_left_in_training_mode(form, tmp_path):
    model = Net(nn.Dropout(0.5)).train()
    export = exported(model, (X,), form, tmp_path)
    report = ampcheck.compare(model.eval(), export, X)
    (finding,) = report.findings
    assert (finding.code, finding.module, reasons(report)) == ("AMP601", "body.1", ["training-mode"])
    assert "Dropout" in finding.message
    assert "model.eval()" in finding.fix


@pytest.mark.parametrize("form", ["trace", "program"])
def test_dropout_in_both_is_a_warning(form, tmp_path):
    model = Net(nn.Dropout(0.5)).train()
    report = ampcheck.compare(model, exported(model, (X,), form, tmp_path), X)
    assert reasons(report) == ["training-mode"]
    assert report.count(ampcheck.Severity.ERROR) == 0


@pytest.mark.parametrize("form", ["trace", "program"])
def test_buffers_updated(form, tmp_path):
    model = Net(Counting()).eval()
    export = exported(model, (X,), form, tmp_path)
    before = model.body[1].count.clone()
    report = ampcheck.compare(model, export, X)
    assert "buffer-update" in reasons(report)
    assert "body.1.count" in found(report)["AMP601"].message
    assert model.body[1].count == before


@pytest.mark.parametrize("form", ["trace", "program"])
def test_batch_norm_in_training_mode(form, tmp_path):
    model = Net(nn.BatchNorm1d(6)).train()
    export = exported(model, (X,), form, tmp_path)
    report = ampcheck.compare(model.eval(), export, X)
    assert {"training-mode", "buffer-update"} <= set(reasons(report))
    assert any("running_mean" in finding.message for finding in report.findings)


def test_other_weights():
    model = Net(TorchTanh()).eval()
    export = traced(model)
    other = Net(TorchTanh()).eval()
    report = ampcheck.compare(other, export, X)
    assert reasons(report) == ["state-differs"]


def test_an_autograd_function_is_opaque():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Rounding(nn.Module):
        def forward(self, x):
            return Round.apply(x)

    model = Net(Rounding()).eval()
    (finding,) = ampcheck.compare(model, traced(model), X).findings
    assert (finding.code, finding.module) == ("AMP603", "body.1")
    assert (finding.evidence["kind"], finding.evidence["name"]) == ("autograd-function", "Round")


def test_everything_is_put_back():
    model = Net(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))).train()
    export = traced(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    ampcheck.compare(model, export, X)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fail_on():
    model = Net(NumpyTanh()).eval()
    with pytest.raises(ampcheck.FindingsError, match=r"AMP60[12]"):
        ampcheck.compare(model, traced(model), X, fail_on="error")


def test_report_text_and_json(tmp_path):
    model = Net(NumpyTanh()).eval()
    report = ampcheck.compare(model, traced(model), X)
    text = str(report)
    assert "TorchScript trace against eager · differs" in text
    assert "check_tolerance" in text
    assert "first module whose output differs  body.1" in text
    assert report.to_dict()["comparison"]["first_module"] == "body.1"
    report.write(tmp_path / "report.json")
