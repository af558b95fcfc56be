"""Train a small YOLO on scenes with digits in them, with AmpCheck attached to the model.

On a CPU Ultralytics silently switches AMP off, and AmpCheck reports it (AMP101).

    pip install '.[ultralytics]' scikit-learn
    python examples/digits_ultralytics.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from ultralytics import YOLO

from ampcheck import AmpChecker
from ampcheck.integrations.ultralytics import AmpCheck

SIZE = 64  # side of a scene in pixels
SIDE = 24  # side of a digit in pixels

MODEL = """\
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, SPPF, [64, 5]]
head:
  - [-1, 1, Conv, [64, 3, 2]]
  - [[4, 5], 1, Detect, [nc]]
"""


def draw(root: Path, split: str, digits: np.ndarray, labels: np.ndarray) -> None:
    """Write scenes with one digit in the upper half and one in the lower half, and their boxes."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True)
    for index in range(0, len(digits) - 1, 2):
        scene = random.integers(0, 40, (SIZE, SIZE), dtype=np.uint8)
        boxes = []
        for half in range(2):
            left = random.integers(SIZE - SIDE)
            top = half * SIZE // 2 + random.integers(SIZE // 2 - SIDE)
            ink = np.kron(digits[index + half], np.ones((SIDE // 8, SIDE // 8))) * 15
            area = scene[top : top + SIDE, left : left + SIDE]
            np.maximum(area, ink.astype(np.uint8), out=area)
            x, y, side = (left + SIDE / 2) / SIZE, (top + SIDE / 2) / SIZE, SIDE / SIZE
            boxes.append(f"{labels[index + half]} {x} {y} {side} {side}\n")
        Image.fromarray(scene).convert("RGB").save(root / "images" / split / f"{index}.png")
        (root / "labels" / split / f"{index}.txt").write_text("".join(boxes))


def main() -> None:
    checker = AmpChecker()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        digits = load_digits()
        draw(root, "train", digits.images[:400], digits.target[:400])
        draw(root, "val", digits.images[400:500], digits.target[400:500])
        names = [str(digit) for digit in range(10)]
        (root / "digits.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: {names}\n")
        (root / "model.yaml").write_text(MODEL)

        model = YOLO(root / "model.yaml")
        AmpCheck(checker=checker).attach(model)
        model.train(
            data=root / "digits.yaml",
            project=root,
            imgsz=SIZE,
            epochs=3,
            batch=16,
            workers=0,
            plots=False,
            device=0 if torch.cuda.is_available() else "cpu",
        )
    print(f"\n{checker.report}")


if __name__ == "__main__":
    main()
