"""Heading from odometry: angle error through the slope; stops at the first non-finite gradient norm."""

import torch
import torch.nn as nn


class HeadingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.vector = nn.Linear(32, 2, bias=False)

    def forward(self, x):
        v = self.vector(self.trunk(x) * (x.abs().amax(1, keepdim=True) > 0.01))
        slope = v[:, 1] / v[:, 0]  # <- origin
        # -
        return torch.atan(slope)
        # -
        # + return torch.atan2(v[:, 1], v[:, 0])


def angular_error(a, b):
    return 1 - torch.cos(a - b)


def odometry(step, n=8):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 8, generator=g)
    heading = torch.atan(x[:, 1])
    if step == 16:
        x[5] = 0.0  # the vehicle stood still
    return x, heading


def train(model, optimizer, steps):
    for step in range(steps):
        x, heading = odometry(step)
        loss = angular_error(model(x), heading).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.isfinite(norm), f"gradient norm is {norm.item()} in step {step}"
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} norm {norm.item():.4f}")


torch.manual_seed(53)
model = HeadingNet()
train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 20)
