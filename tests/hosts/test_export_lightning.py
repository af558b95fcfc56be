"""What Lightning exports, compared with the module it was exported from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ampcheck

lightning = pytest.importorskip("lightning")


class Detour(nn.Module):
    """Leaves PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy().clip(-1, 1) * 2)  # leaves the dispatcher


class Twice(nn.Module):
    """The same in PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-1, 1) * 2


class Classifier(lightning.LightningModule):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), middle, nn.Flatten())
        self.head = nn.Linear(4 * 6 * 6, 10)
        self.example_input_array = torch.rand(2, 1, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def exported(model: lightning.LightningModule, form: str, folder: Path) -> object:
    x = model.example_input_array
    if form == "torchscript":
        if not hasattr(model, "to_torchscript"):
            pytest.skip("this version of Lightning has no to_torchscript")
        return model.to_torchscript(method="trace", example_inputs=x)
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = folder / "model.onnx"
    model.to_onnx(file, x)
    return file


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
def test_a_healthy_export(form: str, tmp_path: Path) -> None:
    model = Classifier(Twice()).eval()
    report = ampcheck.compare(model, exported(model, form, tmp_path), model.example_input_array)
    assert report.findings == ()
    assert {"encoder", "encoder.3", "head"} <= {module.module for module in report.comparison.modules}


@pytest.mark.parametrize("form", ["torchscript"])
def test_a_detour_is_named_with_module_and_line(form: str, tmp_path: Path) -> None:
    model = Classifier(Detour()).eval()
    report = ampcheck.compare(model, exported(model, form, tmp_path), model.example_input_array)
    findings = {finding.code: finding for finding in report.findings}
    assert findings["AMP602"].module == findings["AMP601"].module == "encoder.2"
    assert "leaves the dispatcher" in findings["AMP602"].sites[0].code


def test_a_module_in_training_mode(tmp_path: Path) -> None:
    """Lightning exports in evaluation mode whatever mode the module is in: compare in that."""
    model = Classifier(Twice()).train()
    script = exported(model, "torchscript", tmp_path)
    assert model.training
    assert ampcheck.compare(model.eval(), script, model.example_input_array).findings == ()
