"""Digits as Ultralytics reads them: drawn into scenes with boxes, or sorted into folders."""

from __future__ import annotations

from pathlib import Path

import torch
from digits import digits, upscaled
from PIL import Image
from torch import Tensor

YAML = """\
nc: 10
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, SPPF, [32, 5]]
head:
  - [-1, 1, Conv, [32, 3, 2]]
  - [[4, 5], 1, Detect, [nc]]
"""
"""A detector of Ultralytics' own modules, small enough to train in a second."""


def detector(root: Path, yaml: str = YAML) -> Path:
    """The yaml file of a tiny detector."""
    path = root / "tiny.yaml"
    path.write_text(yaml)
    return path


def draw_scenes(root: Path, *, train: int = 16, val: int = 8, size: int = 64) -> Path:
    """Scenes of ``size`` by ``size`` pixels with two digits each, their boxes, and the data yaml, whose path is
    returned."""
    for split, count in (("train", train), ("val", val)):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        generator = torch.Generator().manual_seed(count)
        cutouts = digits(split, 2 * count)
        for index in range(count):
            scene = torch.randint(0, 40, (3, size, size), generator=generator, dtype=torch.uint8)
            boxes = []
            for half in range(2):
                side = 8 * int(torch.randint(2, 4, (), generator=generator))
                left = half * size // 2 + int(torch.randint(size // 2 - side + 1, (), generator=generator))
                top = int(torch.randint(size - side + 1, (), generator=generator))
                digit = 2 * index + half
                ink = _pixels(cutouts.images[digit], side)
                area = scene[:, top : top + side, left : left + side]
                torch.maximum(area, ink, out=area)
                center = ((left + side / 2) / size, (top + side / 2) / size)
                boxes.append(f"{int(cutouts.labels[digit])} {center[0]} {center[1]} {side / size} {side / size}\n")
            _save(scene, images / f"{index:03}.png")
            (labels / f"{index:03}.txt").write_text("".join(boxes))
    names = ", ".join(f"'{digit}'" for digit in range(10))
    data = root / "digits.yaml"
    data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [{names}]\n")
    return data


def sort_into_folders(root: Path, *, train: int = 40, val: int = 20, size: int = 32) -> Path:
    """One folder of images a class, as classification reads them; returns the root."""
    for split, count in (("train", train), ("val", val)):
        for index, (image, label) in enumerate(zip(*digits(split, count), strict=True)):
            folder = root / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            _save(_pixels(image, size), folder / f"{index:03}.png")
    return root


def _pixels(digit: Tensor, size: int) -> Tensor:
    """(1, 8, 8) in 0 to 1 as uint8 of shape (3, size, size)."""
    return (255 * upscaled(digit[None], size)[0]).to(torch.uint8)


def _save(pixels: Tensor, path: Path) -> None:
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(path)
