"""A model grown stage by stage; the newest stage is faded in."""

import torch
from torch import nn


class Grown(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Linear(8, 8)])
        self.fade = 1.0

    def grow(self):
        self.stages.append(nn.Linear(8, 8))
        self.fade = 0.0

    def forward(self, x):
        *first, last = self.stages
        for stage in first:
            x = stage(x).tanh()
        y = torch.sigmoid(last(x))  # <- save
        if self.fade < 1.0:
            y.lerp_(x, 1 - self.fade)  # <- write
            # -
            # + y = y.lerp(x, 1 - self.fade)
        return y


def run(epochs):
    torch.manual_seed(0)
    model = Grown()
    optimizer = torch.optim.Adam(model.parameters())
    for epoch in range(epochs):
        if epoch == 2:
            model.grow()
            optimizer.add_param_group({"params": model.stages[-1].parameters()})
        for step in range(4):
            model.fade = min(1.0, model.fade + 0.1)
            x = torch.randn(3, 8)
            loss = (model(x) - x.sigmoid()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


run(4)
