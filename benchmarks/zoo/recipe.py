"""The parts of a model in the zoo, and the loop that trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 2


class Precision:
    """The precision a model trains in: ``fp32``, ``bf16`` autocast, or ``fp16`` autocast with a loss scaler."""

    def __init__(self, name: str) -> None:
        self.dtype = DTYPES[name]
        self.scaler = torch.amp.GradScaler("cpu") if self.dtype is torch.float16 else None

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, *optimizers: torch.optim.Optimizer) -> None:
        for optimizer in optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()


class Training:
    """A model with its data. ``loss`` runs the model in training mode and returns the loss; ``predict`` runs it for
    evaluation. Subclasses train in other ways."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        predict: Callable[[], object],
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.predict = predict
        if optimizer is None:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9)
        self.optimizers: list[torch.optim.Optimizer] = [optimizer]

    def step(self, precision: Precision) -> Tensor:
        """One training step; returns the loss."""
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        with precision.autocast():
            loss = self.loss()
        precision.backward(loss)
        precision.step(optimizer)
        return loss.detach()

    def evaluate(self, precision: Precision) -> None:
        with torch.no_grad(), precision.autocast():
            self.predict()


def classifier(model: nn.Module, x: Tensor, *, classes: int = 10) -> Training:
    """An image or sequence classifier; the first of several outputs has the logits."""
    labels = torch.randint(classes, (len(x),))

    def loss() -> Tensor:
        output = model(x)
        logits = output if isinstance(output, Tensor) else output[0]
        return nn.functional.cross_entropy(logits, labels)

    return Training(model, loss, lambda: model(x))


@dataclass(frozen=True)
class Recipe:
    """A model in the zoo: ``build`` makes it with random weights. ``alone``: it changes its process for good, so no
    other model may run there after it."""

    name: str
    family: str
    build: Callable[[], Training]
    needs: Sequence[str] = ()
    alone: bool = False
    dtypes: Sequence[str] = field(default=tuple(DTYPES))
