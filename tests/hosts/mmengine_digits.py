"""The parts of an MMEngine project: a model, a data set, a metric and optimizer wrappers, by the registries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from digits import digits
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import DATASETS, METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@DATASETS.register_module()
class Digits(Dataset):
    def __init__(self, split: str, count: int) -> None:
        self.images, self.labels = digits(split, count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@METRICS.register_module()
class DigitAccuracy(BaseMetric):
    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        labels = data_batch[1]
        predictions = torch.stack(list(data_samples)).cpu()
        self.results.append((int((predictions == labels).sum()), len(labels)))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        return {"accuracy": sum(right for right, _ in results) / sum(count for _, count in results)}


@MODELS.register_module()
class DigitsNet(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(128, 10)

    def logits(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.backbone(images).flatten(1)))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        logits = self.logits(images)
        if mode == "loss":
            return {"loss": self.loss(logits, labels)}
        return list(logits.argmax(1)) if mode == "predict" else logits


@MODELS.register_module()
class HalfDigitsNet(DigitsNet):
    """Made half by its author, who also asks for mixed precision."""

    def __init__(self) -> None:
        super().__init__()
        self.half()

    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images.half())


@MODELS.register_module()
class HalfHeadDigitsNet(DigitsNet):
    """Has a half head, which autocast feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.head.half()


@MODELS.register_module()
class MistypedDigitsNet(DigitsNet):
    raised: TypeError | None = None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        try:
            with torch.autocast(device=logits.device.type, enabled=False):
                return F.cross_entropy(logits.float(), labels)
        except TypeError as error:
            self.raised = error
            raise


@MODELS.register_module()
class LateMistypedDigitsNet(MistypedDigitsNet):
    """Reaches the mistyped line in its fifth step only."""

    steps = 0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.steps += 1
        return super().loss(logits, labels) if self.steps == 5 else DigitsNet.loss(self, logits, labels)


@MODELS.register_module()
class FailingEvaluationNet(DigitsNet):
    """A plain fault of the user's, in evaluation."""

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        if mode == "predict":
            raise LookupError("no such class")
        return super().forward(images, labels, mode)


@MODELS.register_module()
class TwoPartDigitsNet(DigitsNet):
    """Two optimizers, as for a GAN: `train_step` picks the wrapper."""

    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        with optim_wrapper["backbone"].optim_context(self):
            losses = self._run_forward(self.data_preprocessor(data, True), mode="loss")
        loss, log = self.parse_losses(losses)
        for part in ("backbone", "head"):
            optim_wrapper[part].zero_grad()
        optim_wrapper["backbone"].backward(loss)
        for part in ("backbone", "head"):
            optim_wrapper[part].step()
        return log


@OPTIM_WRAPPERS.register_module()
class AnyDeviceAmpOptimWrapper(AmpOptimWrapper):
    """`AmpOptimWrapper` for every device and for float16 on the CPU; MMEngine's own refuses both."""

    def __init__(self, dtype: str | None = None, loss_scale: dict[str, Any] | None = None, **kwargs: Any) -> None:
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler(get_device(), **(loss_scale or {}))
        self.cast_dtype = getattr(torch, dtype) if dtype else None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with OptimWrapper.optim_context(self, model), torch.autocast(get_device(), dtype=self.cast_dtype):
            yield


@OPTIM_WRAPPERS.register_module()
class IdleAmpOptimWrapper(AnyDeviceAmpOptimWrapper):
    """Scales the loss and forgets autocast."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with OptimWrapper.optim_context(self, model):
            yield


@OPTIM_WRAPPERS.register_module()
class OtherDtypeAmpOptimWrapper(AnyDeviceAmpOptimWrapper):
    """Asked for float16, computes in bfloat16."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with OptimWrapper.optim_context(self, model), torch.autocast(get_device(), dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPERS.register_module()
class SecretiveAmpOptimWrapper(AnyDeviceAmpOptimWrapper):
    """Keeps its scaler to itself."""

    def __init__(self, **kwargs: Any) -> None:
        self._scaler: torch.amp.GradScaler | None = None
        super().__init__(**kwargs)

    @property
    def loss_scaler(self) -> torch.amp.GradScaler:
        raise RuntimeError("not yours")

    @loss_scaler.setter
    def loss_scaler(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs: Any) -> None:
        self._scaler.step(self.optimizer, **kwargs)
        self._scaler.update()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TwoPartConstructor:
    """One optimizer wrapper for the backbone and one for the head."""

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        self.config = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapperDict:
        wrappers = {}
        for part in ("backbone", "head"):
            config = deepcopy(self.config)
            config["optimizer"] = torch.optim.SGD(getattr(model, part).parameters(), lr=0.05)
            wrappers[part] = OPTIM_WRAPPERS.build(config)
        return OptimWrapperDict(**wrappers)
