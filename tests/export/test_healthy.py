"""Correct exports give no finding."""

from __future__ import annotations

import pytest
import torch
from export_forms import exported

import ampcheck

ZOO = [
    ("timm", "resnet10t"),
    ("timm", "test_vit"),
    ("timm", "test_convnext"),
    ("timm", "test_efficientnet"),
    ("timm", "test_resnet"),
    ("timm", "mobilenetv3_small_050"),
    ("timm", "lcnet_035"),
    ("torchvision", "squeezenet1_1"),
    ("torchvision", "shufflenet_v2_x0_5"),
    ("torchvision", "mnasnet0_5"),
]


def network(library: str, name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model(name, pretrained=False).eval()
    models = pytest.importorskip("torchvision.models")
    return models.get_model(name, weights=None).eval()


def sized(model: torch.nn.Module) -> torch.Tensor:
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 64, 64))[-1]
    return torch.rand(1, 3, size if size == 160 else 64, size if size == 160 else 64)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["trace", "program", "onnx"])
@pytest.mark.parametrize(("library", "name"), ZOO, ids=lambda value: value)
def test_no_finding_and_every_module_compared(library, name, form, tmp_path):
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = network(library, name)
    x = sized(model)
    report = ampcheck.compare(model, exported(model, (x,), form, tmp_path), x)
    assert report.findings == ()
    comparison = report.comparison
    assert comparison.equal
    assert comparison.unseen is None
    assert comparison.first_module is None
    assert len(comparison.modules) > 10
    assert len(comparison.inputs) >= 4
