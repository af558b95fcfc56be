"""A feature pyramid whose top-down path begins with multi-scale training."""

import torch
from torch import nn
from torch.nn import functional as F


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(3))
        self.smooth = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.top_down = False

    def forward(self, x):
        levels = []
        for conv in self.down:
            x = F.silu(conv(x)).sigmoid()  # <- save
            levels.append(x)
        if self.top_down:
            for i in range(2, 0, -1):
                levels[i - 1] += F.interpolate(levels[i], scale_factor=2.0)  # <- write
                # -
                # + levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], scale_factor=2.0)
        return [conv(level) for conv, level in zip(self.smooth, levels)]


torch.manual_seed(0)
model = Pyramid()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
sizes = [16] * 4 + [32, 16]
for size in sizes:
    model.top_down = size > 16
    outputs = model(torch.randn(2, 3, size, size))
    loss = sum(output.square().mean() for output in outputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
