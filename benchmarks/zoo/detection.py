"""Ultralytics' models, built from their yaml files at the smallest scale, with the losses they train on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .recipe import DTYPES, Recipe, Training

SIDE = 64

# yaml file: task
_YAMLS = {
    "yolov3-tiny": "detect",
    "yolov5n": "detect",
    "yolov6n": "detect",
    "yolov8n": "detect",
    "yolov8n-ghost": "detect",
    "yolov8n-p2": "detect",
    "yolov8n-rtdetr": "rtdetr",
    "yolov8n-seg": "segment",
    "yolov8n-pose": "pose",
    "yolov8n-obb": "obb",
    "yolov8n-cls": "classify",
    "yolov9t": "detect",
    "yolov9c-seg": "segment",
    "yolov10n": "detect",
    "yolo11n": "detect",
    "yolo11n-seg": "segment",
    "yolo11n-pose": "pose",
    "yolo11n-obb": "obb",
    "yolo11n-cls": "classify",
    "yolo12n": "detect",
    "yolo12n-seg": "segment",
    "yolo12n-pose": "pose",
    "yolo12n-obb": "obb",
    "yolo12n-cls": "classify",
    "yolo26n": "detect",
    "yolo26n-seg": "segment",
}


def _batch(task: str) -> dict[str, Any]:
    """Two images with two objects each, as the trainers pass them to the model; boxes are relative to the side."""
    # An RT-DETR picks 300 of the places of its feature maps.
    side = 160 if task == "rtdetr" else SIDE
    objects = 4
    boxes = torch.cat((0.3 + 0.4 * torch.rand(objects, 2), 0.2 + 0.2 * torch.rand(objects, 2)), dim=1)
    batch: dict[str, Any] = {
        "img": torch.rand(2, 3, side, side),
        "cls": torch.randint(3, (objects, 1)).float(),
        "bboxes": boxes,
        "batch_idx": torch.tensor([0.0, 0.0, 1.0, 1.0]),
    }
    if task == "classify":
        batch["cls"] = torch.randint(3, (2,))
    if task == "segment":
        batch["masks"] = torch.randint(3, (2, SIDE // 4, SIDE // 4)).float()
        batch["sem_masks"] = torch.randint(3, (2, SIDE // 4, SIDE // 4))
    if task == "pose":
        batch["keypoints"] = torch.cat((torch.rand(objects, 17, 2), torch.full((objects, 17, 1), 2.0)), dim=2)
    if task == "obb":
        batch["bboxes"] = torch.cat((boxes, torch.rand(objects, 1)), dim=1)
    return batch


def _yolo(name: str, task: str) -> Training:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn import tasks

    kinds = {
        "detect": tasks.DetectionModel,
        "segment": tasks.SegmentationModel,
        "pose": tasks.PoseModel,
        "obb": tasks.OBBModel,
        "classify": tasks.ClassificationModel,
        "rtdetr": tasks.RTDETRDetectionModel,
    }
    model = kinds[task](f"{name}.yaml", nc=3, verbose=False)
    # As their trainer does. The convolution that turns distributions into distances is fixed.
    model.args, model.nc = get_cfg(), 3
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl" not in key)
    batch = _batch(task)

    def loss() -> Tensor:
        total: Tensor = model(batch)[0]
        return total.sum()

    return Training(model, loss, lambda: model(batch["img"]))


DETECTION = [
    Recipe(
        f"ultralytics/{name}",
        f"ultralytics {task}",
        partial(_yolo, name, task),
        needs=("ultralytics",),
        # 300 queries in emulated float16 take minutes on a CPU.
        dtypes=("fp32", "bf16") if task == "rtdetr" else tuple(DTYPES),
    )
    for name, task in _YAMLS.items()
]
