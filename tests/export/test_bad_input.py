"""Input that cannot be compared gives one clear line."""

from __future__ import annotations

import pytest
import torch
from export_forms import exported
from faulty import Net, TorchTanh
from torch import nn

import ampcheck

X = torch.randn(3, 6)
PAIR = nn.Bilinear(6, 6, 6)


class Two(nn.Module):
    def forward(self, x):
        return x, x + 1


@pytest.fixture
def model():
    return Net(TorchTanh()).eval()


def refused(*args, **options):
    with pytest.raises(ValueError, match=r".") as caught:
        ampcheck.compare(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_wrong_arity(model):
    assert "does not take these inputs" in refused(model, exported(model, (X,), "trace", None), (X, X))
    assert "takes 1 inputs, not 2" in refused(PAIR, exported(model, (X,), "trace", None), (X, X))
    assert "takes 1 inputs, not 2" in refused(PAIR, exported(model, (X,), "program", None), (X, X))


def test_no_tensor(model):
    assert "no tensor" in refused(model, exported(model, (X,), "trace", None), ())


@pytest.mark.parametrize("name", ["none.pt", "none.pt2", "none.onnx"])
def test_missing_file(model, name, tmp_path):
    assert f"there is no file {str(tmp_path / name)!r}" == refused(model, tmp_path / name, X)


@pytest.mark.parametrize("name", ["bad.pt", "bad.pt2", "bad.onnx"])
def test_a_file_of_something_else(model, name, tmp_path):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    torch.save(model.state_dict(), tmp_path / name)
    assert "cannot" in refused(model, tmp_path / name, X, trusted=True)


def test_a_file_that_may_run_code_is_loaded_where_it_is_trusted(model, tmp_path):
    torch.export.save(torch.export.export(model, (X,)), tmp_path / "model.pt2")
    assert "trusted" in refused(model, tmp_path / "model.pt2", X)
    assert ampcheck.compare(model, tmp_path / "model.pt2", X, trusted=True).comparison.equal


def test_no_export_at_all(model):
    assert "a Net is not an exported model" in refused(model, model, X)


def test_other_dtype(model):
    double = X.double()
    assert "the eager model does not run" in refused(model, exported(model, (X,), "trace", None), double)
    wide = Net(TorchTanh()).eval().double()
    assert "computes in float32" in refused(wide, exported(model, (X,), "trace", None), double)
    assert "is float64, and the torch.export program takes float32" in refused(
        wide, exported(model, (X,), "program", None), double
    )


def test_other_device(model):
    far = Net(TorchTanh()).eval().to("meta")
    assert (
        refused(far, exported(model, (X,), "trace", None), X) == "the inputs are on cpu, and the eager model is on meta"
    )


def test_other_shape(model):
    assert "has the shape [4, 6], and the torch.export program takes [3, 6]" in refused(
        model, exported(model, (X,), "program", None), torch.randn(4, 6)
    )


@pytest.mark.parametrize("form", ["trace", "program"])
def test_outputs_of_another_structure(model, form):
    text = refused(model, exported(Two().eval(), (X,), form, None), X)
    assert "returns 1 tensors (float32[3, 2])" in text
    assert "2 (float32[3, 6], float32[3, 6])" in text


def test_unknown_code_and_threshold(model):
    export = exported(model, (X,), "trace", None)
    assert "no rule's code" in refused(model, export, X, select="AMP7")
    assert "fail_on" in refused(model, export, X, fail_on="loud")
