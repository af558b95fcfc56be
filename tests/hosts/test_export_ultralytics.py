"""`compare_export=True`: what Ultralytics exports is compared with the model that its exporter wrote it from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("YOLO_OFFLINE", "1")
pytest.importorskip("ultralytics")

from hosts.ultralytics_scenes import YAML, detector
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER

import ampcheck
from ampcheck import AmpChecker, FindingsError
from ampcheck.integrations.exports import ultralytics as exports
from ampcheck.integrations.ultralytics import AmpCheck

DETOUR = YAML.replace("  - [-1, 1, SPPF, [32, 5]]", "  - [-1, 1, Detour, []]")
FORMATS = ["torchscript", "onnx"]


class Detour(nn.Module):
    """A user's block that leaves PyTorch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy().clip(-1, 1) * 200)  # leaves the dispatcher


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(LOGGER, level, lambda text, *args: lines.append(str(text)))
    return lines


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exports in a folder of its own, and installs nothing on the way."""
    monkeypatch.setattr("ultralytics.engine.exporter.check_requirements", lambda *args, **kwargs: True)
    monkeypatch.setattr(tasks, "Detour", Detour, raising=False)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def run(check: AmpCheck | None, form: str, yaml: str = YAML, **options: Any) -> Path:
        if form == "onnx":
            pytest.importorskip("onnxruntime")
            pytest.importorskip("onnx")
            options.setdefault("simplify", False)
        torch.manual_seed(0)
        model = YOLO(detector(tmp_path, yaml))
        if check is not None:
            check.attach(model)
        return tmp_path / model.export(format=form, imgsz=64, **options)

    return run


def said(log: list[str]) -> str:
    (text,) = (line for line in log if "against eager" in line or "AmpCheck" in line)
    return text


@pytest.mark.parametrize("form", FORMATS)
def test_a_healthy_export(export: Any, log: list[str], form: str) -> None:
    file = export(AmpCheck(compare_export=True), form)
    assert "against eager · equal on 4 inputs" in said(log)
    assert "AMP6" not in said(log)
    written = json.loads(Path(f"{file}.ampcheck.json").read_text())
    assert written["findings"] == []
    compared = {module["module"] for module in written["comparison"]["modules"]}
    assert {"model.0.conv", "model.2.m.0", "model.6.cv2.0.0", "model.6"} <= compared


@pytest.mark.parametrize("form", FORMATS)
def test_a_detour_is_named_with_module_and_line(export: Any, log: list[str], form: str) -> None:
    file = export(AmpCheck(compare_export=True), form, DETOUR)
    text = said(log)
    assert "differs on 4 inputs" in text
    assert "first module whose output differs  model." in text
    written = json.loads(Path(f"{file}.ampcheck.json").read_text())
    findings = {finding["code"]: finding for finding in written["findings"]}
    assert findings["AMP602"]["module"] == findings["AMP601"]["module"] == "model.4"
    (site,) = findings["AMP602"]["sites"]
    assert "leaves the dispatcher" in site["code"]
    assert site["code"] in text


def test_sizes_that_a_dynamic_export_claims_are_tried(export: Any, log: list[str]) -> None:
    export(AmpCheck(compare_export=True), "onnx", dynamic=True)
    assert "equal on 5 inputs" in said(log)
    assert "other sizes, 2×3×" in said(log)


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_with_suppression_in_it(export: Any, log: list[str], form: str) -> None:
    export(AmpCheck(compare_export=True, report=False), form, nms=True)
    assert "against eager · equal" in said(log)


def test_it_is_off_by_default(export: Any, log: list[str]) -> None:
    file = export(AmpCheck(), "torchscript")
    assert not any("against eager" in line for line in log)
    assert list(file.parent.glob("*.json")) == []


def test_fail_on_raises_once_all_is_written(export: Any, log: list[str], tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match="AMP60"):
        export(AmpCheck(compare_export=True, fail_on="error"), "torchscript", DETOUR)
    assert "AMP602" in said(log)
    assert (tmp_path / "tiny.torchscript").is_file()
    assert (tmp_path / "tiny.torchscript.ampcheck.json").is_file()


def test_select_holds_for_exports(export: Any, log: list[str]) -> None:
    export(AmpCheck(compare_export=True, select="AMP603"), "torchscript", DETOUR)
    assert "error[" not in said(log)


def test_options_of_an_injected_checker_hold_for_exports(export: Any, log: list[str], tmp_path: Path) -> None:
    checker = AmpChecker(fail_on="error", ignore=(code for code in ["AMP602"]), report=False)
    with pytest.raises(FindingsError, match="AMP601"):
        export(AmpCheck(checker=checker, compare_export=True), "torchscript", DETOUR)
    assert "AMP602" not in said(log)
    assert (tmp_path / "tiny.torchscript").is_file()
    assert list(tmp_path.glob("*.json")) == []


def test_a_fault_of_ours_does_not_break_the_export(
    export: Any, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("no such thing")

    monkeypatch.setattr(exports, "compare", fail)
    assert export(AmpCheck(compare_export=True, fail_on="error"), "torchscript").is_file()
    assert said(log) == "AmpCheck (AMP900): the export was not compared: AttributeError: no such thing"


def test_the_file_is_the_same_as_without(export: Any) -> None:
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        plain = torch.jit.load(export(None, "torchscript"))(images)
        checked = torch.jit.load(export(AmpCheck(compare_export=True), "torchscript"))(images)
    assert torch.equal(plain, checked)


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_compared_in_one_call_with_the_model_as_the_user_has_it(export: Any, form: str) -> None:
    """Unfused, and with a head that returns its raw predictions too."""
    file = export(None, form)
    torch.manual_seed(0)
    model = YOLO(detector(file.parent)).model.eval()
    report = ampcheck.compare(model, file, torch.rand(1, 3, 64, 64), outputs=lambda y: y[0])
    assert report.findings == ()
    assert report.comparison.equal
    assert len(report.comparison.modules) > 20
