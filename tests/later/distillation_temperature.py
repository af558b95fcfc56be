"""Distillation; the student's distribution is sharpened in a helper after half of the training."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def sharpen_(p, power):
    p.pow_(power)  # <- write
    return p / p.sum(-1, keepdim=True).detach()


class Distiller(nn.Module):
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, x, progress):
        with torch.inference_mode():
            soft = self.teacher(x).softmax(-1)
        p = self.student(x).softmax(-1)  # <- save
        if progress > 0.5:
            p = sharpen_(p, 1 + math.sin(progress))
            # -
            # + p = sharpen_(p.clone(), 1 + math.sin(progress))
        return F.mse_loss(p, soft.clone())


torch.manual_seed(0)
distiller = Distiller(nn.Linear(6, 4), nn.Linear(6, 4))
optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad])
data = [torch.randn(5, 6) for _ in range(8)]
for index, x in enumerate(data):
    loss = distiller(x, index / len(data))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
