"""Numbers that fail in Ultralytics' real trainer, on real digits."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("YOLO_OFFLINE", "1")
pytest.importorskip("ultralytics")

from failing_layers import LAYERS, STEP, Angle, DigitNet, Late, Masked, Scores, Statistics, assert_true
from hosts.test_ultralytics import AmpClassifier, can_train_as_on_a_gpu, said, to_bytes
from hosts.ultralytics_scenes import detector, sort_into_folders
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER

from ampcheck import AmpChecker, Finding
from ampcheck.integrations.ultralytics import FIXES, AmpCheck

YAML = """\
nc: 10
backbone:
  - [-1, 1, DigitLayer, []]
head: []
"""
QUIET = {
    "epochs": 2, "batch": 4, "nbs": 4, "imgsz": 32, "workers": 0, "plots": False, "device": "cpu", "verbose": False,
    "warmup_epochs": 0, "optimizer": "SGD", "lr0": 0.01,
}  # fmt: skip


class Float16Classifier(AmpClassifier):
    """Trains in float16 with a scaler, as on a GPU."""

    scaler = property(
        lambda self: vars(self).setdefault("_scaler", torch.amp.GradScaler("cpu", init_scale=64.0)),
        lambda self, value: None,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sort_into_folders(tmp_path_factory.mktemp("folders"), train=40, val=8)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads, default = torch.get_num_threads(), torch.get_autocast_dtype("cpu")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_autocast_dtype("cpu", default)


@pytest.fixture
def train(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[AmpChecker, YOLO]]:
    def train(layer: Callable[[], nn.Module], numerics: str | None, attach: Any = None, **arguments: Any) -> Any:
        can_train_as_on_a_gpu()
        monkeypatch.setattr(tasks, "DigitLayer", lambda *_: DigitNet(layer()), raising=False)
        if getattr(layer, "only_float16", True):
            torch.set_autocast_dtype("cpu", torch.float16)
        model = YOLO(detector(tmp_path, YAML), task="classify")
        check = AmpCheck(ignore="AMP101,AMP105,AMP107,AMP310", numerics=numerics or "off")
        if numerics:
            check.attach(model)
        if attach is not None:
            attach(model)
        trainer = Float16Classifier if getattr(layer, "only_float16", True) else ClassificationTrainer
        train.checker = check.session.checker  # type: ignore[attr-defined]
        arguments = {"data": str(folders), "project": str(tmp_path / "runs"), "trainer": trainer, **QUIET, **arguments}
        try:
            model.train(**arguments)
        except RuntimeError as error:
            # Ultralytics repeats the epoch some times.
            if "NaN persisted" not in str(error):
                raise
        return check.session.checker, model

    return train


def numeric(checker: AmpChecker) -> list[Finding]:
    assert checker.report is not None
    findings = checker.report.findings
    return [one for one in findings if one.code.startswith("AMP5") and one.code not in ("AMP512", "AMP515")]


@pytest.mark.parametrize("layer", LAYERS)
def test_guard(train: Any, layer: type[Late]) -> None:
    checker, _ = train(layer, "guard")
    (finding,) = numeric(checker)
    assert_true(finding, layer, "model.0.layer")


@pytest.mark.parametrize("layer", [Scores, Masked])
def test_stop(train: Any, layer: type[Late]) -> None:
    weights: list[dict[str, Tensor]] = []

    def attach(model: YOLO) -> None:
        keep = lambda trainer: weights.append(copy.deepcopy(dict(trainer.model.named_parameters())))  # noqa: E731
        model.add_callback("on_train_batch_start", keep)
        trainers.append(model)

    trainers: list[YOLO] = []
    with pytest.raises(FloatingPointError, match=f"of step {STEP} is not finite") as raised:
        train(layer, "stop", attach)
    (finding,) = numeric(train.checker)
    assert_true(finding, layer, "model.0.layer")
    assert finding.code in raised.value.__notes__[0]
    assert finding.host_fix == FIXES.get(f"{finding.code}:bfloat16")
    assert len(weights) == STEP + 1
    own = dict(trainers[0].trainer.model.named_parameters())
    assert all(torch.equal(value, weights[-1][name]) for name, value in own.items())


def test_free_finds_statistics_at_the_next_stop(train: Any) -> None:
    checker, _ = train(Statistics, "free")
    finding = numeric(checker)[0]
    assert finding.code == "AMP511"
    assert finding.evidence["moment"] == "at the end of epoch 1"
    assert finding.evidence["buffers"] == ["model.0.layer.norm.running_mean", "model.0.layer.norm.running_var"]
    assert finding.host_fix == FIXES["AMP511"]


def test_free_is_told_the_loss_and_looks_at_the_next_steps(train: Any) -> None:
    checker, _ = train(Scores, "free")
    (finding,) = numeric(checker)
    assert_true(finding, Scores, "model.0.layer", None)


def test_step_under_accumulation(train: Any) -> None:
    checker, _ = train(Angle, "guard", nbs=8)
    (finding,) = numeric(checker)
    assert_true(finding, Angle, "model.0.layer", STEP // 2)


class Healthy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def test_healthy_run_says_nothing_and_is_bit_identical(train: Any) -> None:
    log: list[str] = []
    handler = type("Keep", (logging.Handler,), {"emit": lambda self, one: log.append(one.getMessage())})()

    def trained(numerics: str | None) -> list[Any]:
        torch.manual_seed(0)
        losses: list[Any] = []
        keep = lambda trainer: losses.append(to_bytes(trainer.loss))  # noqa: E731
        checker, model = train(Healthy, numerics, lambda model: model.add_callback("on_train_batch_end", keep))
        assert not numerics or checker.report.findings == ()
        one = model.trainer
        return [
            losses,
            to_bytes(one.model.state_dict()),
            to_bytes(one.ema.ema.state_dict()),
            to_bytes(torch.get_rng_state()),
        ]

    plain = trained(None)
    LOGGER.addHandler(handler)
    try:
        for numerics in ("free", "guard", "stop"):
            log.clear()
            assert trained(numerics) == plain
            assert len([line for line in said(log) if "not judged" not in line]) == 3
    finally:
        LOGGER.removeHandler(handler)


@pytest.mark.parametrize("numerics", ["free", "guard", "stop"])
def test_nothing_stays_behind(train: Any, numerics: str) -> None:
    engine, step = torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__
    try:
        train(Masked, numerics)
    except FloatingPointError:
        assert numerics == "stop"
    assert (torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__) == (engine, step)
    run = train.checker._run
    assert (run.held, run.numerics, run.find_batch) == (None, None, None)
