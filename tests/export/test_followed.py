"""Exports inside a run: compared where they happen, explained where they die, and nothing changed by it."""

from __future__ import annotations

import gc
import json
import random
import re
import warnings

import numpy as np
import pytest
import torch
from faulty import NumpyTanh
from torch import nn
from torch.nn import functional as F

import ampcheck
from ampcheck import FindingsError


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Gate(nn.Module):
    def __init__(self, repaired=False):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.repaired = repaired

    def forward(self, x):
        x = self.linear(x)
        if self.repaired:
            return torch.where(x.mean() > 0, x, -2 * x)
        if x.mean() > 0:  # <- branch
            return x
        return -2 * x


class Healthy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.drop(self.norm(self.linear(x))))


X = torch.randn(3, 4)


def followed(export, *args, **options):
    """The report of a block that calls ``export(*args)``, and the lines that it said."""
    said = []
    with ampcheck.watch(None, report=False, emit=said.append, **options) as watch:
        try:
            export(*args)
        except FindingsError:
            raise
        except Exception:  # noqa: BLE001, S110 - what a program does that handles it
            pass
    return watch.report, said


def codes(report):
    return [finding.code for finding in report.findings]


def onnx(model, dynamo, path=None):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    extra = {"verbose": False} if dynamo else {}
    return torch.onnx.export(model, (X,), str(path) if path else None, dynamo=dynamo, **extra)


EXPORTS = {
    "trace": lambda model, folder: torch.jit.trace(model, X),
    "trace of forward": lambda model, folder: torch.jit.trace(model.forward, X),
    "trace by keyword": lambda model, folder: torch.jit.trace(model, example_kwarg_inputs={"x": X}),
    "trace_module": lambda model, folder: torch.jit.trace_module(model, {"forward": X}),
    "script with examples": lambda model, folder: torch.jit.script(model, example_inputs=[(X,)]),
    "program": lambda model, folder: torch.export.export(model, (X,)),
    "program by keyword": lambda model, folder: torch.export.export(model, (), {"x": X}),
    "onnx": lambda model, folder: onnx(model, True, folder / "model.onnx"),
    "legacy onnx": lambda model, folder: onnx(model, False, folder / "model.onnx"),
}


@pytest.mark.parametrize("how", EXPORTS)
def test_a_healthy_export_is_one_line(how, tmp_path):
    report, said = followed(EXPORTS[how], Gate(repaired=True).eval(), tmp_path)
    assert report.findings == ()
    (export,) = report.trace.exports
    assert export.comparison.equal
    assert export.model == "Gate"
    assert len(said) == 1
    assert "· equal on" in said[0]


def test_a_frozen_branch_is_named_with_its_line_and_the_export():
    report, said = followed(lambda: torch.jit.trace(Gate().eval(), X))
    (finding,) = report.findings
    assert finding.code == "AMP601"
    assert finding.sites[0].code.startswith("if x.mean() > 0:")
    assert finding.sites[-1].op == "torch.jit.trace"
    assert report.to_dict()["exports"][0]["comparison"]["equal"] is False
    assert "differs" in said[0]


def test_a_constant_is_named():
    report, _ = followed(lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4), NumpyTanh()).eval(), X))
    assert "AMP602" in codes(report)


def test_an_export_under_autocast_is_compared_outside_of_it():
    def export():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            torch.jit.trace(Gate(repaired=True).eval(), X, check_trace=False)

    report, _ = followed(export)
    assert codes(report) == ["AMP604"]


def test_an_onnx_export_that_leaves_training_mode_by_itself(tmp_path):
    model = Healthy()
    report, _ = followed(lambda: onnx(model, False, tmp_path / "model.onnx"))
    assert report.findings == ()
    assert report.trace.exports[0].comparison.equal
    assert all(module.training for module in model.modules())


def test_what_is_exported_in_turn_is_compared_with_the_module(tmp_path):
    def export():
        program = torch.export.export(model, (X,))
        torch.onnx.export(program, (), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)

    pytest.importorskip("onnxscript")
    model = Gate(repaired=True).eval()
    report, _ = followed(export)
    assert [(one.model, one.comparison.equal) for one in report.trace.exports] == [("Gate", True), ("Gate", True)]


def test_the_same_export_again_is_compared_once():
    model = Gate(repaired=True).eval()

    def export():
        for _ in range(5):
            torch.jit.trace(model, X)

    report, said = followed(export)
    assert len(report.trace.exports) == len(said) == 1


def test_functions_and_what_pytorch_exports_itself_are_not_followed():
    def export():
        torch.jit.script(F.hardswish)
        torch.jit.trace(lambda x: x * 2, X)

    report, _ = followed(export)
    assert report.trace.exports == ()


def test_a_class_compiled_by_torchscript_finds_the_names_around_it():
    def export():
        scale = 3

        @torch.jit.script
        class Scaled:
            def __init__(self, x: int) -> None:
                self.x = x * scale

        return Scaled(2).x

    with ampcheck.watch(None, report=False, emit=lambda line: None):
        inside = attempt(export)
    assert inside == attempt(export)


def attempt(export):
    try:
        return export()
    except Exception as error:  # noqa: BLE001 - either way, it is the same
        return type(error)


def test_it_can_be_switched_off():
    report, _ = followed(lambda: torch.jit.trace(Gate().eval(), X), exports=False)
    assert report.trace.exports == ()


def test_too_large_a_model_is_left_out(monkeypatch):
    monkeypatch.setattr("ampcheck.export.followed._BYTES", 16)
    report, said = followed(lambda: torch.jit.trace(Gate().eval(), X))
    assert report.findings == ()
    assert "not compared: its parameters take" in said[0]


def test_too_slow_a_model_is_left_out(monkeypatch):
    monkeypatch.setattr("ampcheck.export.followed._CALL", 0.0)
    _, said = followed(lambda: torch.jit.trace(Gate().eval(), X))
    assert "not compared: one call of the model takes" in said[0]


def test_inputs_end_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr("ampcheck.export.followed._SECONDS", 0.0)
    report, said = followed(lambda: torch.jit.trace(Gate().eval(), X))
    assert report.trace.exports[0].comparison.inputs == ("the example",)
    assert "no further inputs were tried" in said[0]


def test_fail_on_stops_at_the_export():
    with pytest.raises(FindingsError, match="AMP601"):
        followed(lambda: torch.jit.trace(Gate().eval(), X), fail_on="error")


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.gains = [nn.Parameter(torch.ones(4))]

    def forward(self, x):
        return x * self.gains[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x))


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


class Named(nn.Module):
    def forward(self, x, **options):
        return x


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, "text"


class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))


def under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.jit.trace(Tied().eval(), X)


DEATHS = {
    "data-dependent-branch": lambda folder: torch.export.export(Gate().eval(), (X,)),
    "autocast-cache": lambda folder: under_autocast(),
    "unregistered-tensor": lambda folder: torch.jit.trace(Listed().eval(), X),
    "python-call": lambda folder: torch.jit.trace(Rounding(), X).save(str(folder / "model.pt")),
    "not-in-torchscript": lambda folder: torch.jit.script(Named()),
    "no-onnx-operator": lambda folder: onnx(Bessel(), False, folder / "model.onnx"),
    "not-a-tensor": lambda folder: torch.jit.trace(Pair(), X),
    "left-dispatcher": lambda folder: torch.export.export(Numpy(), (X,), strict=False),
}


@pytest.mark.parametrize("fault", DEATHS)
def test_an_export_that_dies_is_explained(fault, tmp_path):
    with (
        pytest.raises(Exception, match=r"\S") as caught,
        ampcheck.watch(None, report=False, emit=lambda line: None) as watch,
    ):
        DEATHS[fault](tmp_path)
    finding = next(finding for finding in watch.report.findings if finding.code == "AMP605")
    assert (finding.evidence["reason"], str(finding.severity)) == (fault, "error")
    assert "AMP605" in "".join(caught.value.__notes__)
    assert watch.report.trace.failure.type == type(caught.value).__name__


@pytest.mark.parametrize("fault", DEATHS)
def test_an_export_whose_death_the_program_handles_is_a_warning(fault, tmp_path):
    report, said = followed(DEATHS[fault], tmp_path)
    finding = next(finding for finding in report.findings if finding.code == "AMP605")
    assert (finding.evidence["reason"], str(finding.severity)) == (fault, "warning")
    assert any("warning[AMP605]" in line for line in said)


def test_exports_before_training_are_in_the_run_s_report(tmp_path):
    model = Gate()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ampcheck.watch(model, optimizer=optimizer, report=tmp_path / "report.json", emit=lambda line: None):
        torch.jit.trace(model.eval(), X)
        model.train()
        for _ in range(2):
            model(X).sum().backward()
            optimizer.step()
    written = json.loads((tmp_path / "report.json").read_text())
    assert [export["function"] for export in written["exports"]] == ["torch.jit.trace"]
    assert [one["code"] for one in written["findings"] if one["code"].startswith("AMP6")] == ["AMP601"]
    assert written["modules"]


def train(folder, watched):
    """Some epochs, each with an export: weights, losses, random state, and what was exported."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = Healthy()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses, graphs = [], []
    context = ampcheck.watch(model, report=False, emit=lambda line: None) if watched else warnings.catch_warnings()
    with context:
        for _epoch in range(3):
            model.train()
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(torch.randn(8, 4)).float().pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            # In training mode on purpose: what the export itself changes must be all that changes.
            traced = torch.jit.trace(model, X, check_trace=False)
            program = torch.export.export(model.eval(), (X,))
            # TorchScript counts the classes and values that a process has made.
            graphs += [re.sub(r"___torch_mangle_\d+\.|%\d+", "", text) for text in (str(traced.graph), traced.code)]
            graphs.append(str(program.graph))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return losses, graphs, state, model.calls, torch.get_rng_state(), random.random(), np.random.rand()


def test_training_with_exports_is_the_same_to_the_bit(tmp_path):
    plain, watched = train(tmp_path, False), train(tmp_path, True)
    assert plain[0] == watched[0]
    assert plain[1] == watched[1]
    assert all(torch.equal(plain[2][name], watched[2][name]) for name in plain[2])
    assert plain[3] == watched[3]
    assert torch.equal(plain[4], watched[4])
    assert plain[5:] == watched[5:]


def test_nothing_is_left_behind():
    functions = (torch.jit.trace, torch.jit.script, torch.export.export, torch.onnx.export, torch.jit.save)
    before = [function.__code__ for function in functions]
    followed(lambda: torch.jit.trace(Gate().eval(), X))
    followed(lambda: torch.export.export(Gate().eval(), (X,)))
    assert [function.__code__ for function in functions] == before
    assert not any(module._forward_hooks for module in Gate().modules())


def test_the_program_s_output_stays_quiet(capsys):
    class Talks(Gate):
        def forward(self, x):
            print("forward")
            return super().forward(x)

    model = Talks(repaired=True).eval()
    torch.jit.trace(model, X, check_trace=False)
    alone = capsys.readouterr().out
    followed(lambda: torch.jit.trace(model, X, check_trace=False))
    assert capsys.readouterr().out == alone


def test_of_two_that_follow_the_inner_one_reports(tmp_path):
    model = Gate().eval()
    with ampcheck.watch(None, report=False, emit=lambda line: None) as outer:
        inner, _ = followed(lambda: torch.jit.trace(model, X))
        torch.export.export(Gate(repaired=True).eval(), (X,))
    assert codes(inner) == ["AMP601"]
    assert [export.function for export in outer.report.trace.exports] == ["torch.export.export"]


def test_a_session_that_is_never_ended_leaves_nothing():
    before = torch.jit.trace.__code__
    session = ampcheck.Session(report=False)
    session.attach(Gate(), emit=lambda line: None)
    assert torch.jit.trace.__code__ is not before
    del session
    gc.collect()
    assert torch.jit.trace.__code__ is before
