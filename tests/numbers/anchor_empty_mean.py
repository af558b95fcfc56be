"""Dense detector: regression loss over the positive anchors only."""

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(64)


class AnchorHead(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.cls = nn.Conv2d(width, 1, 1)
        self.reg = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        f = self.tower(x)
        return self.cls(f).flatten(1), self.reg(f).flatten(2).transpose(1, 2)


def losses(cls, reg, labels, deltas):
    positive = labels > 0
    loss_cls = F.binary_cross_entropy_with_logits(cls, labels)
    loss_reg = F.smooth_l1_loss(reg[positive], deltas[positive])  # <- origin
    # -
    # + loss_reg = F.smooth_l1_loss(reg[positive], deltas[positive], reduction="sum") / positive.sum().clamp(min=1)
    return {"loss_cls": loss_cls, "loss_reg": loss_reg}


def batch(step):
    g = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, 32, 32, generator=g)
    labels = (torch.rand(2, 64, generator=g) > 0.9).float()
    deltas = torch.randn(2, 64, 4, generator=g)
    if step == 3:
        labels.zero_()  # two background images in one batch
    return images, labels, deltas


head = AnchorHead()
optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
for step in range(8):
    images, labels, deltas = batch(step)
    with torch.autocast("cpu", dtype=torch.float16):
        cls, reg = head(images)
        terms = losses(cls, reg, labels, deltas)
        total = sum(terms.values())
    optimizer.zero_grad()
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    print(step, {k: round(v.item(), 4) for k, v in terms.items()})
