"""The mission's model, timm's features and a head that a user wrote, and what a replay of it must not change."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks

from ampcheck import AmpChecker, Finding

BACKBONE = "mobilenetv4_conv_small_035"
SIZE = 32
LATE = 3


class DigitNet(nn.Module):
    """timm's features, and a head that the user wrote; from training call ``wrong_from`` on it is wrong."""

    def __init__(self, wrong_from: int = LATE) -> None:
        super().__init__()
        self.backbone = create_model(BACKBONE, num_classes=0)
        self.classifier = nn.Linear(self.backbone.head_hidden_size, 10)
        self.wrong_from = wrong_from
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        # Ultralytics calls a model that it has built, to measure it.
        self.calls += self.training and torch.is_grad_enabled()
        x = self.backbone(images)
        return self.head(x) if self.calls >= self.wrong_from else self.classifier(x)

    def head(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training, inplace=True)
        return self.classifier(x)


class CastNet(DigitNet):
    def head(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.classifier(x)


class LargeNet(DigitNet):
    """Its batch fits into memory once."""

    def forward(self, images: Tensor) -> Tensor:
        if self.calls == LATE:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(images)


def state_of(
    model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """Everything that a replay could change, tensors as bytes."""
    own = list(model.named_modules())
    return {
        "parameters": {n: (id(p), as_bytes(p), p.requires_grad) for n, p in model.named_parameters()},
        "gradients": {n: (id(p.grad), as_bytes(p.grad)) for n, p in model.named_parameters()},
        "buffers": {n: as_bytes(b) for n, b in model.named_buffers()},
        "average": as_bytes(averaged.state_dict()),
        "optimizer": as_bytes(optimizer.state_dict()),
        "scaler": scaler and as_bytes(scaler.state_dict()),
        "random": as_bytes([torch.get_rng_state(), random.getstate(), np.random.get_state()]),
        "training": {n: m.training for n, m in own},
        "calls": [module.calls for module in model.modules() if isinstance(module, DigitNet)],
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for n, m in own},
        "global hooks": (len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks)),
        "modes": torch._C._len_torch_dispatch_stack(),
        "regions": (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()),
    }


def as_bytes(value: Any) -> Any:
    if isinstance(value, Tensor):
        content = value.detach().contiguous().flatten().view(torch.uint8)
        return value.dtype, tuple(value.shape), content.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    return tuple(map(as_bytes, value)) if isinstance(value, (list, tuple)) else value


def line_of(text: str, cls: type[nn.Module] = DigitNet) -> int:
    """The line of this file on which ``cls`` says ``text``."""
    lines, first = inspect.getsourcelines(cls)
    (offset,) = (offset for offset, line in enumerate(lines) if text in line)
    return first + offset


def failure_of(checker: AmpChecker) -> Finding:
    assert checker.report is not None
    codes = {"AMP401", "AMP203", "AMP408"}
    (finding,) = (finding for finding in checker.report.findings if finding.code in codes)
    return finding


def note_of(error: BaseException) -> str:
    (note,) = error.__notes__
    return note


def names_the_dropout_line(finding: Finding, *, module: str = "") -> None:
    """The user's line is the write, timm's ReLU the save; and nobody is told to change timm."""
    assert finding.code == "AMP401"
    sites = {site.role: site for site in finding.sites}
    write, save = sites["write"], sites["save"]
    assert Path(write.file).name == Path(__file__).name
    assert write.line == line_of("inplace=True")
    assert "F.dropout(x, 0.2, self.training, inplace=True)" in write.code
    assert save.module == f"{module}backbone.norm_head.act"
    assert save.node is not None
    assert save.node.startswith("ReluBackward")
    assert finding.fix.startswith("Write `x = F.dropout(x, 0.2, self.training)` at ")
    assert f"{Path(__file__).name}:{write.line}" in finding.fix
