"""Reported failures in MMEngine's own Runner, on scikit-learn's digits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hosts.mmengine_digits import DigitsNet
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F

from ampcheck.integrations.mmengine import AmpCheckHook
from cases import Cases, Guard

CASES = Cases(family="dtype", host="mmengine")
case = CASES.case
CONFIG = Path(__file__).parents[1] / "hosts" / "mmengine_config.py"
EXPERIMENT = itertools.count()
FLOAT32 = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}


def train(guard: Guard, net: Callable[[], nn.Module], **options: Any) -> None:
    """A short run with float16 and a loss scaler, or as ``options`` say."""
    MODELS.register_module(name="CaseNet", module=net, force=True)
    config = Config.fromfile(CONFIG)
    config.work_dir, config.experiment_name = "mmengine", f"case{next(EXPERIMENT)}"
    config.model, config.custom_hooks = {"type": "CaseNet"}, []
    config.train_dataloader.dataset.count = 48
    for name, value in options.items():
        config[name] = value
    runner = Runner.from_cfg(config)
    if guard.checker is not None:
        runner.register_hook(AmpCheckHook(checker=guard.checker))
    with guard.host(runner.model):
        runner.train()


@case(
    "mmengine-hand-written-convolution",
    "AMP203",
    source=("https://github.com/open-mmlab/mmdetection/issues/11653",),
    module="mix",
    reason="autocast-disabled-here",
    remedies=2,
    marks={"raise": "raise", "call": "off", "cast": "made"},
    operands={"x": "float16", "mix.weight": "float16", "mix.bias": "float32"},
)
def hand_written_convolution(guard: Guard, repaired: int) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
            self.bias = nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.is_autocast_enabled("cpu"):
                return F.conv2d(x, self.weight, self.bias, padding=1)
            if repaired == 1:
                with torch.autocast("cpu", enabled=False):
                    return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
            if repaired == 2:
                return F.conv2d(x, self.weight.to(x.dtype), self.bias, padding=1)
            with torch.autocast("cpu", enabled=False):  # <- off
                return F.conv2d(x, self.weight.to(x.dtype), self.bias, padding=1)  # <- raise

    class Detector(DigitsNet):
        def __init__(self) -> None:
            super().__init__()
            self.backbone.append(nn.Conv2d(8, 8, 1))
            self.mix = Mix()

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            features = self.backbone(images)  # <- made
            return self.head(self.mix(features).flatten(1))

    train(guard, Detector)


@case(
    "mmengine-neck-adds-in-place",
    "AMP401",
    family="in-place",
    source=(
        "https://github.com/open-mmlab/mmdetection/pull/9450",
        "https://github.com/open-mmlab/mmsegmentation/pull/1103",
    ),
    module="neck",
    marks={"write": "write", "save": "save"},
    evidence={"node": "ReluBackward0", "slot": "result", "dtype": "float16"},
)
def neck_adds_in_place(guard: Guard, repaired: int) -> None:
    class Pafpn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lateral_convs = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(2))

        def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
            laterals = [conv(level) for conv, level in zip(self.lateral_convs, levels, strict=True)]  # <- save
            finer = F.interpolate(laterals[1], size=laterals[0].shape[2:])
            if repaired:
                laterals[0] = laterals[0] + finer
            else:
                laterals[0] += finer  # <- write
            return laterals[0]

    class Detector(DigitsNet):
        def __init__(self) -> None:
            super().__init__()
            self.neck = Pafpn()

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            x = self.backbone(images)
            return self.head(self.neck([x, F.max_pool2d(x, 2)]).flatten(1))

    train(guard, Detector)


@case(
    "mmengine-targets-by-index",
    "AMP209",
    source=("https://github.com/open-mmlab/mmdetection/issues/11416",),
    module="assigner",
    reason="in-place-or-out",
    remedies=2,
    operands={"targets": "float16", "overlaps": "float32"},
)
def targets_by_index(guard: Guard, repaired: int) -> None:
    class Assigner(nn.Module):
        def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            overlaps = logits.float().softmax(-1).amax(-1).detach()
            targets = torch.zeros(len(logits), dtype=overlaps.dtype if repaired == 2 else logits.dtype)
            if repaired == 1:
                targets[labels > 4] = overlaps[labels > 4].to(targets.dtype)
            else:
                targets[labels > 4] = overlaps[labels > 4]  # <- raise
            return (logits.amax(-1) - targets).square().mean()

    class Detector(DigitsNet):
        def __init__(self) -> None:
            super().__init__()
            self.assigner = Assigner()

        def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().loss(logits, labels) + self.assigner(logits, labels)

    train(guard, Detector)


@case(
    "mmengine-backbone-in-inference-mode",
    "AMP406",
    family="autograd",
    source=("https://github.com/open-mmlab/mmsegmentation/issues/3499",),
    module="head",
    marks={"raise": "raise", "call": "made"},
)
def backbone_in_inference_mode(guard: Guard, repaired: int) -> None:
    class Segmentor(DigitsNet):
        def logits(self, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad() if repaired else torch.inference_mode():
                features = self.backbone(images).flatten(1)  # <- made
            return self.head(features)  # <- raise

    train(guard, Segmentor, optim_wrapper=FLOAT32)


@case(
    "mmengine-legacy-fp16",
    "AMP101",
    family="silent",
    source=("https://github.com/open-mmlab/mmdetection/issues/10865",),
    marks={},
    crashes=False,
)
def legacy_fp16(guard: Guard, repaired: int) -> None:
    if repaired:
        train(guard, DigitsNet)
    else:
        train(guard, DigitsNet, optim_wrapper=FLOAT32, fp16={"loss_scale": 512.0})
