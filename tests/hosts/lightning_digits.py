"""Small Lightning modules that learn scikit-learn's digits, for either Lightning package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from digits import digits, upscaled
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

Region = Callable[[], AbstractContextManager[Any]]


def installed() -> list[ModuleType]:
    """Those of Lightning's two packages that are installed."""
    return [
        importlib.import_module(name)
        for name in ("lightning.pytorch", "pytorch_lightning")
        if importlib.util.find_spec(name.partition(".")[0])
    ]


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10)
    )


def off() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def misspelled() -> torch.autocast:
    return torch.autocast(device="cpu", dtype=torch.bfloat16)


@contextlib.contextmanager
def misspelled_from_the_third_call() -> Iterator[None]:
    misspelled_from_the_third_call.calls += 1
    if misspelled_from_the_third_call.calls >= 3:
        misspelled()
    yield


misspelled_from_the_third_call.calls = 0


def digits_module(
    package: ModuleType,
    net: nn.Module | None = None,
    *,
    training: Region = contextlib.nullcontext,
    evaluation: Region = contextlib.nullcontext,
    manual: bool = False,
    size: int | None = None,
) -> Any:
    """A module of ``package`` around ``net`` (default: ``cnn()``) with seeded weights. Its steps run inside the
    regions ``training`` and ``evaluation``; ``losses`` collects the training losses, ``raised`` what they raise."""

    class Digits(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = cnn() if net is None else net
            self.automatic_optimization = not manual
            self.losses: list[float] = []
            self.raised: Exception | None = None

        def loss(self, batch: list[torch.Tensor], region: Region) -> torch.Tensor:
            images, labels = batch
            try:
                with region():
                    return F.cross_entropy(self.net(upscaled(images, size) if size else images), labels)
            except Exception as error:
                self.raised = error
                raise

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch, training)
            self.losses.append(loss.item())
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                with off():
                    self.manual_backward(loss)
                optimizer.step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch, evaluation))

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.net(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    return Digits()


def loader(split: str = "train", count: int = 64, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*digits(split, count)), batch_size)


def trainer(package: ModuleType, *callbacks: Any, **options: Any) -> Any:
    """A trainer for one short epoch on the CPU that writes nothing of its own."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return package.Trainer(callbacks=list(callbacks), **{**quiet, **options})
