"""Trains a detector on digits in two processes that Ultralytics launches: ``ultralytics_steps.py DIRECTORY [dies]``.

The launch is Ultralytics' own, by the file that it generates; what it takes for granted of CUDA is replaced. With
``dies`` the second process computes with tensors of two dtypes. Under torchrun nothing is launched any more.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "1")

import torch
import torch.distributed as dist
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK
from ultralytics_scenes import detector, draw_scenes

from ampcheck.integrations.ultralytics import AmpCheck


class OnCpu(nn.parallel.DistributedDataParallel):
    def __init__(self, model: nn.Module, device_ids: list[int], **options: Any) -> None:
        super().__init__(model, **options)


class TwoProcesses(DetectionTrainer):
    """Takes a CPU for two devices."""

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, {**(overrides or {}), "device": "cpu"}, _callbacks)
        if hasattr(self, "ddp"):
            self.world_size, self.ddp = 2, LOCAL_RANK == -1
        else:
            # Older versions count the devices when training begins.
            self.args.device = "0,1"

    def _setup_ddp(self, *_: Any) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=90))
        nn.parallel.DistributedDataParallel = OnCpu

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = super().preprocess_batch(batch)
        if LOCAL_RANK == 1 and "DIES" in os.environ:
            images = batch["img"].bfloat16()
            nn.functional.linear(images, torch.ones(1, images.shape[-1]))
        return batch

    def final_eval(self) -> None:
        """Asks CUDA for its current device, whatever the device is."""


def main(directory: str, mode: str = "") -> None:
    root = Path(directory)
    if mode == "dies":
        os.environ["DIES"] = "1"
    model = YOLO(detector(root))
    AmpCheck(ignore="AMP107").attach(model)
    settings = {"imgsz": 64, "batch": 8, "epochs": 1, "workers": 0, "plots": False, "device": "cpu", "verbose": False}
    # The class as the processes import it.
    from ultralytics_steps import TwoProcesses as Trainer

    data = root / "scenes/digits.yaml"
    if LOCAL_RANK == -1:
        draw_scenes(data.parent)
    model.train(trainer=Trainer, data=str(data), project=str(root / "runs"), name="run", **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
