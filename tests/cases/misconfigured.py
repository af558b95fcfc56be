"""Mixed precision that is not what was asked for, or not sound, without an error (and scalers that give up)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ampcheck.observe.walk import has_autocast_cache_fault
from ampcheck.precision import Precision
from cases import Cases, Guard
from cases.training import BF16, images, rows, sgd, train

CASES = Cases(family="silent", crashes=False, marks={})
case = CASES.case
MIXED_BF16 = Precision("mixed", "cpu", "bfloat16", False, "dtype: bfloat16 in the config")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@case("scaler-without-autocast", "AMP101", source=("https://github.com/open-mmlab/mmdetection/issues/10865",))
def scaler_without_autocast(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        with torch.autocast("cpu", dtype=torch.float16, enabled=bool(repaired)):
            loss = model(rows()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@case(
    "region-for-a-gpu-that-is-not-there",
    "AMP103",
    source=("https://github.com/meituan/YOLOv6/issues/210", "https://github.com/explosion/spaCy/issues/9570"),
    marks={"call": "region"},
    evidence={"reason": "other-device-type", "region_device_type": "cuda", "model_device_type": "cpu"},
)
def region_for_a_gpu_that_is_not_there(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu" if repaired else "cuda", dtype=BF16):  # <- region
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case(
    "dtype-that-autocast-does-not-take",
    "AMP103",
    source=("https://github.com/kohya-ss/musubi-tuner/issues/738", "https://github.com/hvoss-tech/AutoForge/issues/55"),
    marks={"call": "region"},
    evidence={"reason": "switched-off", "dtype": "float32"},
)
def dtype_that_autocast_does_not_take(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16 if repaired else torch.float32):  # <- region
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case(
    "dtype-of-the-config-ignored",
    "AMP104",
    source=("https://github.com/datawhalechina/happy-llm/pull/215",),
    marks={"call": "region"},
)
def dtype_of_the_config_ignored(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, precision=MIXED_BF16, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16 if repaired else torch.float16):  # <- region
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case("backward-inside-the-region", "AMP106", source=("https://github.com/pytorch/pytorch/issues/125186",))
def backward_inside_the_region(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16):
            loss = model(rows()).float().square().mean()
            if not repaired:
                loss.backward()
        if repaired:
            loss.backward()
        optimizer.step()


@case(
    "deprecated-spelling",
    "AMP108",
    source=(
        "https://github.com/ultralytics/ultralytics/issues/13559",
        "https://github.com/ultralytics/yolov5/pull/13483",
    ),
    marks={"call": "region"},
)
def deprecated_spelling(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16) if repaired else torch.cpu.amp.autocast(dtype=BF16):  # <- region
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case(
    "weights-cached-under-no-grad",
    "AMP109",
    source=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/19517",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/20251",
    ),
    remedies=2,
    marks={"call": "region"},
    evidence={"modules": ["body", "head"]},
    fails=has_autocast_cache_fault,
)
def weights_cached_under_no_grad(guard: Guard, repaired: int) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    model = Normed()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        if repaired == 1:
            with torch.no_grad(), torch.autocast("cpu", dtype=BF16, cache_enabled=False):
                target = model(rows())
        with torch.autocast("cpu", dtype=BF16):  # <- region
            if repaired != 1:
                with torch.no_grad():
                    target = model(rows())
            if repaired == 2:
                torch.clear_autocast_cache()
            loss = F.mse_loss(model(rows().flip(1)).float(), target.float())
        loss.backward()
        optimizer.step()


@case("half-model-under-autocast", "AMP201")
def half_model_under_autocast(guard: Guard, repaired: int) -> None:
    model = Net()
    if not repaired:
        model.bfloat16()
    optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16):
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case("bias-left-in-float32", "AMP202", module="head")
def bias_left_in_float32(guard: Guard, repaired: int) -> None:
    model = Net()
    if not repaired:
        model.head.weight.data = model.head.weight.data.bfloat16()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case("double-anchors", "AMP204")
def double_anchors(guard: Guard, repaired: int) -> None:
    class Anchored(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("anchors", torch.linspace(0, 1, 2, dtype=torch.float32 if repaired else torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float() + self.anchors

    model = Anchored()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case(
    "class-token-in-float32",
    "AMP208",
    source=("https://github.com/open-mmlab/mmpretrain/issues/911",),
    module="",
)
def class_token_in_float32(guard: Guard, repaired: int) -> None:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 4, 4, 4)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            token = self.cls_token.to(x.dtype) if repaired else self.cls_token
            return torch.cat([token.expand(2, -1, -1), x], 1)

    model = Vit()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(images()))


@case(
    "average-kept-in-half",
    "AMP211",
    source=(
        "https://github.com/d8ahazard/sd_dreambooth_extension/pull/1417",
        "https://github.com/d8ahazard/sd_dreambooth_extension/pull/1415",
    ),
)
def average_kept_in_half(guard: Guard, repaired: int) -> None:
    model = Net()
    average = copy.deepcopy(model)
    if not repaired:
        average.half()
    with guard(model, averaged=average), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case("float16-without-a-scaler", "AMP301")
def float16_without_a_scaler(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=bool(repaired))
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(rows()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@case("scaler-for-bfloat16", "AMP302", source=("https://github.com/pytorch/pytorch/issues/127176",))
def scaler_for_bfloat16(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=not repaired)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        with torch.autocast("cpu", dtype=BF16):
            loss = model(rows()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@case("optimizer-made-too-early", "AMP309", source=("https://github.com/huggingface/accelerate/issues/328",))
def optimizer_made_too_early(guard: Guard, repaired: int) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    model.head = nn.Linear(4, 2)
    model.body = nn.Linear(4, 4)
    if repaired:
        optimizer = sgd(model.parameters())
    with guard(model, optimizers=(optimizer,)):
        with torch.autocast("cpu", dtype=BF16):
            loss = model(rows()).float().square().mean()
        loss.backward()
        optimizer.step()


@case("scale-that-only-falls", "AMP307", source=("https://github.com/pytorch/pytorch/issues/40497",))
def scale_that_only_falls(guard: Guard, repaired: int) -> None:
    class Unbounded(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if repaired else y / y.detach().mul(0)

    model = Unbounded()
    optimizer: Any = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(rows()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
