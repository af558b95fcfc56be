"""Compiled extensions: called through pybind, registered, and exchanged for the time of the export."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types

import deformable
import pytest
import torch
from deformable import Cube, Decoder, RegisteredCube, deform_attn_pytorch
from export_forms import exported
from faulty import Net
from test_faults import X, found, marked
from torch.utils import cpp_extension

import ampcheck


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    if shutil.which("ninja") is None or shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler with ninja")
    folder = tmp_path_factory.mktemp("build")
    (source := folder / "deformable.cpp").write_text(deformable.SOURCE, encoding="utf-8")
    try:
        built = cpp_extension.load(
            "ampcheck_test_extension", [str(source)], extra_cflags=["-O0"], build_directory=str(folder)
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no extension can be built here: {str(error).splitlines()[0]}")
    deformable.extension = built
    return built


@pytest.fixture
def decoder(extension):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 20, 8))
    return Decoder().eval(), inputs


def test_the_kernel_and_its_plain_form_agree(extension, decoder):
    model, inputs = decoder
    setting = ampcheck.Setting(plain_kernels={"deformable:deform_attn": deform_attn_pytorch})
    report = ampcheck.compare_settings(model, inputs, setting)
    assert report.comparison.equal
    assert report.comparison.second == "plain kernels"


def test_a_pybind_call_is_named_with_module_and_line(extension):
    torch.manual_seed(0)
    model = Net(Cube()).eval()
    findings = found(ampcheck.compare(model, exported(model, (X,), "trace", None), X))
    assert set(findings) == {"AMP601", "AMP602"}
    baked = findings["AMP602"]
    assert baked.module == findings["AMP601"].module == "body.1"
    assert [site.line for site in baked.sites] == [marked(Cube, "past the dispatcher")]
    assert baked.evidence["target"] in ("deformable:extension.cube", f"{extension.__name__}:cube")


def test_a_registered_op_passes(extension):
    torch.manual_seed(0)
    model = Net(RegisteredCube()).eval()
    report = ampcheck.compare(model, exported(model, (X,), "trace", None), X)
    assert report.findings == ()
    assert report.comparison.equal


@pytest.mark.parametrize("form", ["trace", "program"])
def test_a_custom_op_of_python_passes(form, tmp_path):
    @torch.library.custom_op("ampcheck_test_python::cube", mutates_args=(), schema="(Tensor x) -> Tensor")
    def cube(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() ** 3)

    cube.register_fake(torch.empty_like)

    class PythonCube(torch.nn.Module):
        def forward(self, x):
            return cube(x)

    torch.manual_seed(0)
    model = Net(PythonCube()).eval()
    report = ampcheck.compare(model, exported(model, (X,), form, tmp_path), X)
    assert report.findings == ()
    assert report.comparison.equal


def test_deformable_attention_end_to_end(decoder, tmp_path):
    """The bad export is named, the printed remedy is applied, and the export is equal."""
    model, inputs = decoder
    file = tmp_path / "decoder.pt"
    torch.jit.save(exported(model, inputs, "trace", tmp_path), str(file))
    report = ampcheck.compare(model, file, inputs)
    assert not report.comparison.equal
    baked = [finding for finding in report.findings if finding.code == "AMP602"]
    assert [finding.module for finding in baked] == ["layers.0", "layers.1"]
    assert found(report)["AMP601"].module == "layers.0"
    target = baked[0].evidence["target"]
    assert target in baked[0].fix
    assert "deform_attn" in target

    with ampcheck.plain_kernels({target: deform_attn_pytorch}):
        good = exported(model, inputs, "trace", tmp_path)
    report = ampcheck.compare(model, good, inputs)
    assert report.findings == ()
    assert report.comparison.equal
    assert report.comparison.modules


@pytest.mark.parametrize("form", ["program", "onnx"])
def test_the_plain_path_is_equal_in_other_forms(decoder, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model, inputs = decoder
    with ampcheck.plain_kernels({"deformable:deform_attn": deform_attn_pytorch}):
        export = exported(model, inputs, form, tmp_path)
    report = ampcheck.compare(model, export, inputs)
    assert report.findings == ()
    assert report.comparison.equal


def test_a_known_kernel_is_exchanged_where_its_library_is_imported(monkeypatch):
    """A stand-in under the library's module name: the library itself takes an hour to build."""
    library = types.ModuleType("mmcv.ops.multi_scale_deform_attn")

    class MultiScaleDeformableAttnFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            raise AssertionError("the kernel ran")

    library.MultiScaleDeformableAttnFunction = MultiScaleDeformableAttnFunction
    library.multi_scale_deformable_attn_pytorch = lambda value, shapes, locations, weights: (
        value,
        shapes,
        locations,
        weights,
    )
    monkeypatch.setitem(sys.modules, "mmcv.ops.multi_scale_deform_attn", library)
    with ampcheck.plain_kernels() as exchanged:
        assert exchanged == ("mmcv.ops.multi_scale_deform_attn:MultiScaleDeformableAttnFunction.apply",)
        given = tuple(range(6))
        assert library.MultiScaleDeformableAttnFunction.apply(*given) == (0, 1, 3, 4)
    assert "apply" not in vars(MultiScaleDeformableAttnFunction)


def test_an_unknown_function_is_one_clear_line():
    nothing = ampcheck.plain_kernels({"deformable:nothing": print})
    with pytest.raises(ValueError, match="there is no function 'deformable:nothing'"), nothing:
        pass
