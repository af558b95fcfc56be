"""ONNX models through onnxruntime."""

from __future__ import annotations

import pytest
import torch
from export_forms import exported
from faulty import Gate, Net, NumpyTanh, TorchTanh
from test_faults import X, found, reasons
from torch import nn

import ampcheck

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("form", ["onnx", "onnx-legacy"])
def test_equal_with_its_modules(form, tmp_path):
    model = Net(TorchTanh()).eval()
    report = ampcheck.compare(model, exported(model, (X,), form, tmp_path), X)
    assert report.findings == ()
    assert {"body.0", "body.1", "body.2", "head"} <= {module.module for module in report.comparison.modules}
    assert "torch.onnx.verification" in str(report)


def test_numpy_in_the_model(tmp_path):
    model = Net(NumpyTanh()).eval()
    report = ampcheck.compare(model, exported(model, (X,), "onnx-legacy", tmp_path), X)
    assert found(report)["AMP601"].module == "body.1"
    assert any("NumpyTanh" in site.function for finding in report.findings for site in finding.sites)


def test_a_branch(tmp_path):
    model = Net(Gate()).eval()
    report = ampcheck.compare(model, exported(model, (X,), "onnx-legacy", tmp_path), X)
    assert reasons(report) == ["data-dependent"]


def test_other_sizes_where_the_model_claims_them(tmp_path):
    model = Net(TorchTanh()).eval()
    batch = torch.export.Dim("batch")
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (X,), str(file), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    report = ampcheck.compare(model, file, X)
    assert report.findings == ()
    assert "other sizes, 4×6" in report.comparison.inputs


def test_dropout_left_in_training_mode(tmp_path):
    model = Net(nn.Dropout(0.5)).train()
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (X,), str(file), dynamo=False, training=torch.onnx.TrainingMode.TRAINING, do_constant_folding=False
    )
    report = ampcheck.compare(model.eval(), file, X)
    assert "training-mode" in reasons(report)


def test_an_operator_nobody_knows(tmp_path):
    node = onnx.helper.make_node("Strange", ["x"], ["y"], domain="nowhere")
    shape = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [shape("x", 1, [3, 6])], [shape("y", 1, [3, 6])])
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("nowhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), tmp_path / "strange.onnx")
    with pytest.raises(ValueError, match="onnxruntime cannot load"):
        ampcheck.compare(Net(TorchTanh()).eval(), tmp_path / "strange.onnx", X)
