"""Reported failures in Lightning's own Trainer, on scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from digits import digits
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ampcheck.integrations.lightning import AmpCheck
from cases import Cases, Guard
from cases.training import BF16

CASES = Cases(family="in-place", host="lightning")
case = CASES.case
BOTH = {"write": "write", "save": "save"}


def fit(guard: Guard, module: lightning.LightningModule, *, precision: str | None = None, **options: Any) -> None:
    """A short fit on the CPU; ``"16-mixed"`` with a scaler, as on a GPU."""
    if precision == "16-mixed":
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    elif precision is not None:
        options["precision"] = precision
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=[AmpCheck(checker=guard.checker)] if guard.checker is not None else [],
        detect_anomaly=guard.anomaly,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = DataLoader(TensorDataset(*digits("train", 32)), 8)
    with guard.host(module):
        trainer.fit(module, data, DataLoader(TensorDataset(*digits("val", 16)), 8))


class Module(lightning.LightningModule):
    """Trains ``net`` on digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@case(
    "lightning-generator-after-discriminator-step",
    "AMP405",
    source=(
        "https://github.com/pytorch/pytorch/issues/39141",
        "https://github.com/MorvanZhou/PyTorch-Tutorial/pull/91",
    ),
    module="discriminator.2",
    marks=BOTH,
)
def generator_after_discriminator_step(guard: Guard, repaired: int) -> None:
    class Gan(Module):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64))
            self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer_g, optimizer_d = self.optimizers()
            images = batch[0].flatten(1)
            fake = self.generator(torch.randn(len(images), 8))
            loss_g = -self.discriminator(fake).mean()  # <- save
            loss_d = self.discriminator(fake.detach()).mean() - self.discriminator(images).mean()
            if repaired:
                self.manual_backward(loss_g)
                optimizer_g.step()
            optimizer_d.zero_grad()
            self.manual_backward(loss_d, retain_graph=True)
            optimizer_d.step()  # <- write
            if not repaired:
                self.manual_backward(loss_g)
                optimizer_g.step()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(part.parameters()) for part in (self.generator, self.discriminator)]

    fit(guard, Gan())


@case(
    "lightning-depth-net-under-a-decorator",
    "AMP203",
    family="dtype",
    source=("https://github.com/Megvii-BaseDetection/BEVDepth/issues/165",),
    module="net.depth.reduce_conv",
    reason="autocast-disabled-here",
    remedies=2,
    marks={"raise": "raise", "call": "off", "cast": "made"},
    operands={
        "features": "bfloat16",
        "net.depth.reduce_conv.weight": "float32",
        "net.depth.reduce_conv.bias": "float32",
    },
)
def depth_net_under_a_decorator(guard: Guard, repaired: int) -> None:
    decorate = torch.autocast("cpu", enabled=False) if repaired != 2 else lambda method: method

    class DepthNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce_conv = nn.Conv2d(4, 4, 3)

        @decorate  # <- off
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                return self.reduce_conv(features.float())
            return self.reduce_conv(features)  # <- raise

    class Lss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(1, 4, 3)
            self.depth = DepthNet()
            self.head = nn.Linear(4, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.backbone(x)  # <- made
            return self.head(self.depth(features).mean((2, 3)))

    fit(guard, Module(Lss()), precision="bf16-mixed")


@case(
    "lightning-autocast-kwargs",
    "AMP102",
    family="autocast",
    source=("https://github.com/roboflow/rf-detr/issues/52",),
    module="net",
    reason="device-keyword",
    marks={"raise": "raise", "call": "dict"},
    evidence={"argument": "device", "kwargs_variable": "self.autocast_args"},
)
def autocast_kwargs(guard: Guard, repaired: int) -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = classifier()
            self.autocast_args = {"device": "cpu", "dtype": BF16}  # <- dict

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(**self.autocast_args):  # <- raise
                return self.layers(x)

    backbone = Backbone()
    if repaired:
        backbone.autocast_args["device_type"] = backbone.autocast_args.pop("device")
    fit(guard, Module(backbone), num_sanity_val_steps=0, limit_val_batches=0)


@case(
    "lightning-half-model",
    "AMP303",
    family="scaler",
    source=("https://github.com/Lightning-AI/pytorch-lightning/issues/5140",),
    module="net.1",
    also=("AMP201", "AMP509"),
    marks={"cast": "cast"},
    evidence={"count": 2, "optimized": 2, "parameters": ["net.1.weight", "net.1.bias"]},
)
def half_model(guard: Guard, repaired: int) -> None:
    model = classifier()
    if not repaired:
        model.half()  # <- cast
    fit(guard, Module(model), precision="16-mixed")


@case(
    "lightning-fused-optimizer-clipping",
    "AMP308",
    family="scaler",
    source=("https://github.com/Lightning-AI/pytorch-lightning/issues/15501",),
    marks={},
    remedies=2,
)
def fused_optimizer_clipping(guard: Guard, repaired: int) -> None:
    class Fused(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=repaired != 1)

    clip = {"gradient_clip_val": 1.0} if repaired != 2 else {}
    fit(guard, Fused(classifier()), precision="16-mixed", **clip)


@case(
    "lightning-clipped-while-scaled",
    "AMP305",
    family="scaler",
    source=(
        "https://github.com/Lightning-AI/pytorch-lightning/issues/18089",
        "https://github.com/Lightning-AI/pytorch-lightning/issues/9694",
    ),
    marks={"call": "clip"},
    crashes=False,
)
def clipped_while_scaled(guard: Guard, repaired: int) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__(classifier())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            if repaired:
                self.trainer.precision_plugin.scaler.unscale_(optimizer.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)  # <- clip
            self.trainer.precision_plugin.scaler.step(optimizer.optimizer)
            self.trainer.precision_plugin.scaler.update()

    fit(guard, Manual(), precision="16-mixed")


@case(
    "lightning-evaluation-in-another-dtype",
    "AMP105",
    family="silent",
    marks={},
    crashes=False,
    evidence={"training": "bfloat16", "evaluation": "float16"},
)
def evaluation_in_another_dtype(guard: Guard, repaired: int) -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = classifier()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=BF16 if self.training or repaired else torch.float16):
                return self.layers(x)

    fit(guard, Module(Backbone()))
