"""Reported failures in a train script as timm's is, with timm's models, task, average and scaler."""

from __future__ import annotations

import argparse
from functools import partial
from types import ModuleType

import timm
import torch
from digits import digits, upscaled
from hosts import timm_train
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ampcheck.integrations.timm import install
from cases import Cases, Guard
from cases.training import BF16

CASES = Cases(family="in-place", host="timm")
case = CASES.case


def fork(guard: Guard) -> ModuleType:
    """The script as a module, under AmpCheck where the guard has a checker."""
    script = ModuleType("train")
    vars(script).update(vars(timm_train))
    if guard.checker is not None:
        install(script, checker=guard.checker)
    return script


def train(guard: Guard, model: nn.Module, *, half_average: bool = False) -> None:
    """What ``main`` of the script does before and around ``train_one_epoch``."""
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.9)
    if half_average:
        task.trainable_module_ema.half()
    images, labels = digits("train", 12)
    script = fork(guard)
    with guard.host(model):
        script.train_one_epoch(
            0,
            task.get_trainable_module(),
            DataLoader(TensorDataset(upscaled(images, 32), labels), batch_size=4),
            create_optimizer_v2(model, opt="sgd", lr=1e-2),
            argparse.Namespace(grad_accum_steps=1, fault=None, rank=0),
            task=task,
            amp_autocast=partial(torch.autocast, "cpu", dtype=BF16),
        )


@case(
    "timm-in-place-dropout",
    "AMP401",
    source=("https://github.com/huggingface/pytorch-image-models/issues/2355",),
    module="",
    marks={"write": "write", "save": "save"},
    evidence={"node": "ReluBackward0", "slot": "result", "dtype": "bfloat16"},
)
def in_place_dropout(guard: Guard, repaired: int) -> None:
    class DigitNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("mobilenetv4_conv_small_035", num_classes=0)
            self.classifier = nn.Linear(self.backbone.head_hidden_size, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.backbone(images)  # <- save
            if repaired:
                return self.classifier(F.dropout(x, 0.2, self.training))
            x = F.dropout(x, 0.2, self.training, inplace=True)  # <- write
            return self.classifier(x)

    train(guard, DigitNet())


@case(
    "timm-average-evaluated-on-float-images",
    "AMP203",
    family="dtype",
    module="conv1.0",
    reason="parameter-not-float32",
    marks={},
    trains=False,
)
def average_evaluated_on_float_images(guard: Guard, repaired: int) -> None:
    model = timm.create_model("test_resnet", num_classes=10).to(BF16)
    script = fork(guard)
    images, labels = digits("val", 8)
    images = upscaled(images, 32)
    if repaired:
        images = images.to(next(model.parameters()).dtype)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    with guard.host(model):
        script.validate(model, loader, nn.CrossEntropyLoss(), argparse.Namespace(rank=0))


@case(
    "timm-average-in-half",
    "AMP211",
    family="silent",
    source=("https://github.com/d8ahazard/sd_dreambooth_extension/pull/1417",),
    marks={},
    crashes=False,
)
def average_in_half(guard: Guard, repaired: int) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    train(guard, model, half_average=not repaired)
