"""The user's in-place dropout on what a real timm backbone returns: timm is innocent."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from cases import Cases, Guard

CASES = Cases(family="in-place")
case = CASES.case


@case(
    "mobilenetv4-and-in-place-dropout",
    "AMP401",
    source=("https://github.com/huggingface/pytorch-image-models/issues/2355",),
    module="",
    needs=("timm",),
    marks={"write": "write", "save": "save"},
    evidence={"node": "ReluBackward0", "slot": "result"},
)
def mobilenetv4_and_in_place_dropout(guard: Guard, repaired: int) -> None:
    import timm

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("mobilenetv4_conv_small_050", num_classes=0)
            self.head = nn.Linear(self.backbone.head_hidden_size, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.backbone(images)  # <- save
            if repaired:
                x = F.dropout(x, 0.2, training=self.training)
            else:
                x = F.dropout(x, 0.2, inplace=True, training=self.training)  # <- write
            return self.head(x)

    model = Classifier()
    with guard(model):
        model(torch.rand(2, 3, 64, 64)).sum().backward()
