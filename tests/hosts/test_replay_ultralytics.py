"""A failure of an Ultralytics run after the watched batch: the failing batch is replayed, and named as if watched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("YOLO_OFFLINE", "1")
pytest.importorskip("ultralytics")
pytest.importorskip("timm")

from hosts.timm_digits import (
    LATE,
    SIZE,
    CastNet,
    DigitNet,
    LargeNet,
    failure_of,
    line_of,
    names_the_dropout_line,
    note_of,
    state_of,
)
from hosts.ultralytics_scenes import detector, draw_scenes, sort_into_folders
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks

from ampcheck import AmpChecker
from ampcheck.integrations.ultralytics import FIXES, AmpCheck

QUIET = {"batch": 4, "epochs": 1, "workers": 0, "plots": False, "device": "cpu", "verbose": False, "val": False}

CLASSIFIER = """\
nc: 10
backbone:
  - [-1, 1, DigitLayer, [{wrong_from}]]
head: []
"""
DETECTOR = """\
nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Scale, []]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [[2, 3], 1, Detect, [nc]]
"""


class AmpClassifier(ClassificationTrainer):
    """Trains as on a GPU that passes the AMP check: on a CPU Ultralytics switches AMP off."""

    amp = property(lambda self: True, lambda self, value: None)


class ScalingClassifier(AmpClassifier):
    """With a scaler that scales on a CPU too."""

    scaler = property(
        lambda self: vars(self).setdefault("_scaler", torch.amp.GradScaler("cpu")), lambda self, value: None
    )


class PreprocessingTrainer(DetectionTrainer):
    """Its batches become tensors of two dtypes from the third on, before the model sees them."""

    batches = 0

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        self.batches += 1
        if self.batches >= LATE:
            batch["img"] = nn.functional.conv2d(batch["img"], torch.ones(3, 3, 1, 1, dtype=torch.float16))
        return batch


class Scale(nn.Module):
    """A user's layer between two of Ultralytics', which scales its input in place from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return x
        self.calls += 1
        y = x.sigmoid()
        if self.calls >= LATE:
            y *= self.factor
        return y


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sort_into_folders(tmp_path_factory.mktemp("folders"), train=20, val=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """One training run that fails; ``states`` are those around the diagnosis."""

    def __init__(self, yaml: Path, task: str, path: str) -> None:
        self.checker = AmpChecker(ignore="AMP101,AMP107,AMP310")
        self.model = YOLO(yaml, task=task)
        self.states: list[dict[str, Any]] = []
        check = AmpCheck(checker=self.checker)
        if path == "attach":
            check.attach(self.model)
        else:
            for event, function in check.callbacks.items():
                self.model.add_callback(event, function)
        diagnose = self.checker.diagnose

        def between(*args: Any, **kwargs: Any) -> None:
            self.states.append(self.state())
            diagnose(*args, **kwargs)
            self.states.append(self.state())

        self.checker.diagnose = between  # type: ignore[method-assign]

    def state(self) -> dict[str, Any]:
        trainer = self.model.trainer
        return state_of(trainer.model, trainer.ema.ema, trainer.optimizer, trainer.scaler)

    def train(self, **arguments: Any) -> Exception:
        with pytest.raises(RuntimeError) as raised:
            self.model.train(**QUIET, **arguments)
        return raised.value


@pytest.fixture
def classify(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, Exception]]:
    def classify(
        layer: type[nn.Module], wrong_from: int = LATE, path: str = "attach", **arguments: Any
    ) -> tuple[Run, Exception]:
        monkeypatch.setattr(tasks, "DigitLayer", layer, raising=False)
        run = Run(detector(tmp_path, CLASSIFIER.format(wrong_from=wrong_from)), "classify", path)
        error = run.train(data=str(folders), imgsz=SIZE, project=str(tmp_path / "runs"), **arguments)
        return run, error

    return classify


@pytest.mark.parametrize("step", [1, LATE], ids=["watched", "replayed"])
@pytest.mark.parametrize(
    ("trainer", "path", "dtype"),
    [
        (AmpClassifier, "attach", "bfloat16"),
        (ScalingClassifier, "callbacks", "bfloat16"),
        (ClassificationTrainer, "callbacks", "float32"),
    ],
)
def test_the_user_s_dropout_is_named_and_timm_is_not_blamed(
    classify: Any, trainer: type[ClassificationTrainer], path: str, dtype: str, step: int
) -> None:
    run, error = classify(DigitNet, step, path, trainer=trainer)
    assert "modified by an inplace operation" in str(error)
    finding = failure_of(run.checker)
    names_the_dropout_line(finding, module="model.0.")
    assert finding.host_fix == FIXES["AMP401"]
    assert finding.evidence["dtype"] == dtype
    assert "   ultralytics " in note_of(error)
    before, after = run.states[:2]
    assert before["calls"] == [step]
    for what, value in before.items():
        assert after[what] == value, what


def test_a_dtype_crash_in_a_later_batch_has_its_reason(classify: Any) -> None:
    run, error = classify(CastNet, trainer=AmpClassifier)
    finding = failure_of(run.checker)
    assert (finding.code, finding.module) == ("AMP203", "model.0.classifier")
    assert finding.evidence["reason"] == "autocast-disabled-here"
    assert finding.host_fix == FIXES["AMP203"]
    region = next(site for site in finding.sites if "enabled=False" in site.code)
    assert region.line == line_of("enabled=False", CastNet)
    assert "enabled=False" in note_of(error)
    assert run.states[0] == run.states[1]


def test_memory_that_runs_out_in_the_replay_leaves_what_the_frames_tell(classify: Any) -> None:
    run, error = classify(LargeNet, trainer=AmpClassifier)
    assert "modified by an inplace operation" in str(error)
    finding = failure_of(run.checker)
    assert finding.code == "AMP401"
    assert "a replay of the failing batch ran out of memory" in finding.message
    assert {site.role for site in finding.sites} <= {"raise"}
    assert run.states[0] == run.states[1]


@pytest.fixture
def detect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Run, Exception]]:
    def detect(**arguments: Any) -> tuple[Run, Exception]:
        monkeypatch.setattr(tasks, "Scale", Scale, raising=False)
        data = draw_scenes(tmp_path / "scenes", val=4)
        run = Run(detector(tmp_path, DETECTOR), "detect", "attach")
        return run, run.train(data=str(data), imgsz=64, project=str(tmp_path / "runs"), **arguments)

    return detect


def test_a_layer_of_a_detector(detect: Any) -> None:
    run, _ = detect()
    finding = failure_of(run.checker)
    assert (finding.code, finding.module) == ("AMP401", "model.2")
    sites = {site.role: site.line for site in finding.sites}
    assert sites == {"write": line_of("y *= self.factor", Scale), "save": line_of("x.sigmoid()", Scale)}
    assert finding.fix.startswith("Write `y = y * self.factor` at ")
    assert run.states[0] == run.states[1]


def test_a_batch_that_fails_before_the_model_is_preprocessed_again(detect: Any) -> None:
    run, error = detect(trainer=PreprocessingTrainer)
    finding = failure_of(run.checker)
    assert finding.code == "AMP203"
    assert "AMP203" in note_of(error)
    assert run.checker.report is not None
    assert run.checker.report.trace.graph is not None
    assert run.checker.report.trace.graph.replay == "a replay of the failing batch failed in the same way"
    assert run.states[0] == run.states[1]


def test_an_error_of_something_else_is_not_replayed(classify: Any) -> None:
    class Broken(DigitNet):
        def head(self, x: Tensor) -> Tensor:
            raise RuntimeError("nothing to do with precision")

    run, error = classify(Broken)
    assert not hasattr(error, "__notes__")
    assert run.states[0]["calls"] == [LATE]
    assert run.states[0] == run.states[1]
