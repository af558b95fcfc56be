"""Reported failures in Ultralytics' own trainer, on scenes drawn from scikit-learn's digits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "1")

import torch
from hosts.ultralytics_scenes import detector, draw_scenes
from torch import nn
from torch.nn import functional as F
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks

from ampcheck.integrations.ultralytics import AmpCheck
from cases import Cases, Guard

CASES = Cases(family="dtype", host="ultralytics", trains=False)
case = CASES.case
DETECTOR = """\
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, UserLayer, []]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Conv, [32, 3, 2]]
  - [[2, 3], 1, Detect, [nc]]
"""
SMALL = {
    "epochs": 1,
    "imgsz": 64,
    "batch": 4,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "verbose": False,
    "warmup_epochs": 0,
    "nbs": 4,
    "optimizer": "SGD",
    "lr0": 0.01,
}


class AmpTrainer(DetectionTrainer):
    """Trains as on a GPU that passes the AMP check: on a CPU Ultralytics switches AMP off."""

    amp = property(lambda self: True, lambda self, value: None)


class ScalingTrainer(AmpTrainer):
    """With a scaler that scales on a CPU too."""

    scaler = property(
        lambda self: vars(self).setdefault("_scaler", torch.amp.GradScaler("cpu", init_scale=64.0)),
        lambda self, value: None,
    )


def train(guard: Guard, layer: Callable[[], nn.Module], *, trainer: Any = AmpTrainer, **options: Any) -> None:
    """Train a detector with ``layer`` behind its first convolution."""
    tasks.UserLayer = layer
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        model = YOLO(detector(root, DETECTOR))
        if guard.checker is not None:
            AmpCheck(checker=guard.checker).attach(model)
        data = draw_scenes(root / "scenes", train=12, val=4)
        with guard.host(model.model):
            model.train(trainer=trainer, data=str(data), project=str(root / "runs"), **SMALL, **options)
            # The trainer builds a model of its own.
            assert torch.isfinite(model.trainer.loss).all(), "nothing was trained"


class Analysis(torch.autograd.Function):
    """One level of a Haar transform; its backward is the synthesis with the same filters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(filters)
        ctx.channels = x.shape[1]
        return F.conv2d(x, filters, stride=2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (filters,) = ctx.saved_tensors
        y = F.conv_transpose2d(gradient, filters, stride=2, groups=ctx.channels)  # <- ultralytics-wavelets: raise
        return y, None


class RepairedAnalysis(Analysis):
    forward = staticmethod(torch.amp.custom_fwd(Analysis.forward, device_type="cpu"))
    backward = staticmethod(torch.amp.custom_bwd(Analysis.backward, device_type="cpu"))


class Haar(nn.Module):
    """Four bands at half the resolution, of which the first is kept."""

    transform = Analysis

    def __init__(self) -> None:
        super().__init__()
        low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        filters = torch.stack([a[:, None] * b for a in (low, high) for b in (low, high)])[:, None] / 2
        self.register_buffer("filters", filters.repeat(16, 1, 1, 1))
        self.project = nn.Conv2d(64, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self.project(F.conv2d(x, self.filters, stride=2, groups=16))
        return self.project(self.transform.apply(x, self.filters))


class RepairedHaar(Haar):
    transform = RepairedAnalysis


@case(
    "ultralytics-wavelets",
    "AMP205",
    source=("https://github.com/ultralytics/yolov5/issues/12903",),
    module="model.1",
    reason="custom-function",
    operands={"gradient": "bfloat16", "model.1.filters": "float32"},
)
def wavelets(guard: Guard, repaired: int) -> None:
    train(guard, RepairedHaar if repaired else Haar)


class Gate(nn.Module):
    """Rewrites a slice of what a sigmoid returned, as box decoders do."""

    repaired = False

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sigmoid()  # <- ultralytics-sigmoid-slice: save
        if not (self.training and torch.is_grad_enabled()) or self.repaired:
            return torch.cat([y[:, :2] * 2 - 0.5, y[:, 2:]], 1) * self.factor
        y[:, :2] = y[:, :2] * 2 - 0.5  # <- ultralytics-sigmoid-slice: write
        return y * self.factor


class RepairedGate(Gate):
    repaired = True


@case(
    "ultralytics-sigmoid-slice",
    "AMP401",
    family="in-place",
    module="model.1",
    marks={"write": "write", "save": "save"},
    evidence={"node": "SigmoidBackward0", "slot": "result"},
)
def sigmoid_slice(guard: Guard, repaired: int) -> None:
    train(guard, RepairedGate if repaired else Gate)


class Adapter(nn.Module):
    """A distillation's adapter, which something casts and forgets to cast back."""

    repaired = False

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(16, 16, 1)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return x
        self.calls += 1
        if self.calls == 3 and not self.repaired:
            self.project.half()
        return self.project(x)


class RepairedAdapter(Adapter):
    repaired = True


@case(
    "ultralytics-adapter-left-half",
    "AMP303",
    family="scaler",
    source=("https://github.com/ultralytics/ultralytics/issues/1253",),
    module="model.1.project",
    marks={},
    evidence={"count": 2, "parameters": ["model.1.project.weight", "model.1.project.bias"]},
)
def adapter_left_half(guard: Guard, repaired: int) -> None:
    train(guard, RepairedAdapter if repaired else Adapter, trainer=ScalingTrainer)


@case("ultralytics-amp-on-a-cpu", "AMP101", family="silent", marks={}, crashes=False)
def amp_on_a_cpu(guard: Guard, repaired: int) -> None:
    train(guard, nn.Identity, trainer=DetectionTrainer, amp=not repaired)
