"""Layers whose numbers fail from training step 7 on, as users write them, each with its truth, for every host."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEP = 7


class Late(nn.Module):
    """Fails from its eighth call in training on. ``truth``: what must be found; ``halves``: only float16 fails."""

    truth: ClassVar[dict[str, Any]]
    only_float16 = False

    def __init__(self, width: int = 16, step: int = STEP) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.step = step
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        # Ultralytics calls a model that it has built, to measure it.
        self.calls += self.training and torch.is_grad_enabled()
        return self.compute(self.project(x), self.training and self.calls > self.step)

    def compute(self, x: Tensor, late: bool) -> Tensor:
        raise NotImplementedError

    @classmethod
    def line(cls) -> int:
        lines, first = inspect.getsourcelines(cls)
        (offset,) = (offset for offset, line in enumerate(lines) if "# <- origin" in line)
        return first + offset


class Scores(Late):
    """Attention scores that nobody scales."""

    truth: ClassVar = {"code": "AMP502", "op": "aten::bmm", "kind": "overflow", "float32": True, "bfloat16": True}
    only_float16 = True

    def compute(self, x: Tensor, late: bool) -> Tensor:
        heads = (x + 400 * late).unflatten(-1, (4, 4))
        scores = heads @ heads.transpose(1, 2)  # <- origin
        return x + (scores.softmax(-1) @ heads).flatten(1)


class Energy(Late):
    truth: ClassVar = {"code": "AMP502", "op": "aten::mul", "kind": "overflow", "float32": True, "bfloat16": True}
    only_float16 = True

    def compute(self, x: Tensor, late: bool) -> Tensor:
        scaled = x * (1.0 + 500 * late) + 300.0 * late
        energy = scaled * scaled  # <- origin
        return x + energy * 1e-3


class Pooled(Late):
    """The sum of a large map, as in a dice loss."""

    truth: ClassVar = {"code": "AMP502", "op": "aten::sum", "kind": "overflow", "float32": True, "bfloat16": True}
    only_float16 = True

    def compute(self, x: Tensor, late: bool) -> Tensor:
        mask = x.sigmoid() + 60.0 * late
        big = mask[:, :, None].expand(-1, -1, 100)
        area = big.sum(dim=(1, 2))  # <- origin
        return x * (area / (area + 1))[:, None]


class UnitRows(Late):
    """Normalizes rows with an eps that float16 does not have."""

    truth: ClassVar = {"code": "AMP503", "op": "aten::div", "kind": "constant-lost", "float32": True}
    only_float16 = True

    def compute(self, x: Tensor, late: bool) -> Tensor:
        kept = torch.ones(len(x), 1, dtype=x.dtype)
        kept[0] = 0.0 if late else 1.0
        x = x * kept
        return x / (x.abs().amax(dim=-1, keepdim=True) + 1e-9)  # <- origin


class Distance(Late):
    """The distance of a point from itself."""

    truth: ClassVar = {"code": "AMP504", "op": "aten::sqrt", "kind": "singular", "float32": False, "root": "gradient"}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        other = x.roll(1, 0) if not late else torch.cat([x[:1], x[:-1]])
        distance = (x - other).square().sum(-1).sqrt()  # <- origin
        return x + 0.1 * distance[:, None]


class Entropy(Late):
    truth: ClassVar = {"code": "AMP504", "op": "aten::log", "kind": "singular", "float32": False}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        p = F.relu(x.float() - 100.0 * late) if late else x.float().sigmoid()
        return x + (p * p.log()).sum(-1, keepdim=True)  # <- origin


class Standardized(Late):
    truth: ClassVar = {"code": "AMP504", "op": "aten::div", "kind": "singular", "float32": False}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        x = x.float()
        deviation = (x * (0.0 if late else 1.0)).std(dim=0)
        centered = (x - x.mean(0)) * (0.0 if late else 1.0)
        return x + centered / deviation  # <- origin


class Angle(Late):
    """An angle of 0: the derivative of acos at 1."""

    truth: ClassVar = {"code": "AMP504", "op": "aten::acos", "kind": "singular", "float32": False, "root": "gradient"}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        cosine = F.cosine_similarity(x.float(), x.float().roll(1, 0), dim=-1) * 0.9
        if late:
            cosine = cosine * 0 + 1
        angle = cosine.acos()  # <- origin
        return x + angle[:, None]


class Masked(Late):
    """A row of which nothing is left."""

    truth: ClassVar = {"code": "AMP505", "op": "aten::_softmax", "kind": "masked", "float32": False}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[1] = late
        weights = F.softmax(x.masked_fill(mask, float("-inf")), dim=-1)  # <- origin
        return x + weights


class Variance(Late):
    """The variance of a latent from its logarithm, too large for float32 as well."""

    truth: ClassVar = {"code": "AMP504", "op": "aten::exp", "kind": "overflow", "float32": False}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        logarithm = x.float() + 200.0 * late
        variance = logarithm.exp()  # <- origin
        return x + torch.log1p(variance)


class Focal(Late):
    """The square of a logit, times a weight in half."""

    truth: ClassVar = {"code": "AMP502", "op": "aten::pow", "kind": "overflow", "float32": True, "bfloat16": True}
    only_float16 = True

    def compute(self, x: Tensor, late: bool) -> Tensor:
        shifted = x + 50.0 * late
        return x + shifted.pow(3) * 1e-4  # <- origin


class Ratio(Late):
    """A division by a count that is 0."""

    truth: ClassVar = {"code": "AMP504", "op": "aten::div", "kind": "singular", "float32": False}

    def compute(self, x: Tensor, late: bool) -> Tensor:
        chosen = x > (1e4 if late else -1e4)
        mean = (x * chosen).sum() / chosen.sum()  # <- origin
        return x + mean


LAYERS = (
    Scores, Energy, Pooled, UnitRows, Distance, Entropy, Standardized, Angle, Masked, Variance, Focal, Ratio
)  # fmt: skip


class DigitNet(nn.Module):
    """A digit, a layer, and a class."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.layer = layer
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.stem(images.mean(1, keepdim=True))).flatten(1)
        return self.head(self.layer(x))


class Statistics(nn.Module):
    """Batch norm over what overflows once, in training step ``step``: a scaler does not save its statistics."""

    def __init__(self, step: int = STEP) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.step = step
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == self.step + 1:
            x = x * float("inf")
        return self.norm(x).nan_to_num()


def assert_true(finding: Any, layer: type[Late], module: str, step: int | None = STEP) -> None:
    """``finding`` tells the truth about ``layer``, which the model has as ``module``."""
    truth, evidence = layer.truth, finding.evidence
    assert finding.code == truth["code"]
    assert (evidence["op"], evidence["kind"]) == (truth["op"], truth["kind"])
    assert [site.line for site in finding.sites if site.file.endswith("failing_layers.py")][-1:] == [layer.line()]
    assert finding.module == module
    assert evidence["step"] == step
    for precision in ("float32", "bfloat16"):
        if precision in truth:
            assert evidence["finite_in"][precision] is truth[precision]
    assert evidence["root"] == truth.get("root", "loss")
