"""scikit-learn's bundled digits as tensors: the real images that every host's tests train on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Digits(NamedTuple):
    """``images`` float32 of shape (N, 1, 8, 8) in 0 to 1, ``labels`` int64 of shape (N,)."""

    images: Tensor
    labels: Tensor

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.images, self.labels)


@functools.cache
def _all() -> Digits:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images).to(torch.float32).div(16).reshape(-1, 1, 8, 8)
    return Digits(pixels[order], torch.from_numpy(labels).to(torch.int64)[order])


def digits(split: str = "train", count: int | None = None) -> Digits:
    """The first ``count`` digits of a split: ``"train"`` (1,500 of the 1,797) or ``"val"`` (the other 297)."""
    images, labels = _all()
    part = {"train": slice(0, 1500), "val": slice(1500, None)}[split]
    return Digits(images[part][:count].clone(), labels[part][:count].clone())


def upscaled(images: Tensor, size: int) -> Tensor:
    """(N, 1, H, W) images as (N, 3, size, size), nearest neighbor: what networks for photographs take."""
    return F.interpolate(images, size=(size, size)).expand(-1, 3, -1, -1).contiguous()
