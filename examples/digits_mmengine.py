"""Train on scikit-learn's digits with an MMEngine Runner. The config file loads AmpCheck; this script does not.

pip install '.[mmengine]' scikit-learn
python examples/digits_mmengine.py          # float32, on any device
python examples/digits_mmengine.py --amp    # mixed precision, on a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset


@DATASETS.register_module()
class Digits(Dataset):
    """1,500 digits for training, the other 297 for evaluation."""

    def __init__(self, split: str) -> None:
        images, labels = load_digits(return_X_y=True)
        part = slice(0, 1500) if split == "train" else slice(1500, None)
        self.images = torch.from_numpy(images).float().div(16).view(-1, 1, 8, 8)[part]
        self.labels = torch.from_numpy(labels)[part]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


@MODELS.register_module()
class DigitsNet(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(512, 10)

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        logits = self.head(self.backbone(images).flatten(1))
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, labels)}
        return list(logits.argmax(1)) if mode == "predict" else logits


@METRICS.register_module()
class DigitAccuracy(BaseMetric):
    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        right = torch.stack(list(data_samples)).cpu() == data_batch[1]
        self.results.extend(right.tolist())

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"accuracy": sum(results) / len(results)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amp", action="store_true", help="mixed precision, like MMDetection's --amp")
    parser.add_argument("--work-dir", default="work_dirs/digits")
    args = parser.parse_args()

    config = Config.fromfile(Path(__file__).with_name("digits_mmengine_config.py"))
    config.work_dir = args.work_dir
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.loss_scale = "dynamic"
    runner = Runner.from_cfg(config)
    runner.train()
    print(f"AmpCheck's report: {Path(runner.log_dir) / 'ampcheck.json'}")


if __name__ == "__main__":
    main()
