"""Residual blocks; from a given step on, a dropped branch is removed from the sum in place."""

import torch
from torch import nn


class Residual(nn.Module):
    def __init__(self, channels, drop=0.0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.drop = drop

    def forward(self, x):
        out = self.act(self.norm(self.conv(x)))  # <- save
        if self.training and self.drop > 0:
            keep = (torch.arange(out.size(0)) % 2 == 0).float().view(-1, 1, 1, 1)
            out.mul_(keep)  # <- write
            # -
            # + out = out.mul(keep)
        return x + out


class Trainer:
    def __init__(self):
        self.model = nn.Sequential(nn.Conv2d(1, 4, 1), Residual(4), Residual(4), nn.Flatten(), nn.Linear(64, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.global_step = 0

    def on_step_begin(self):
        if self.global_step == 5:
            self.model[2].drop = 0.5

    def step(self, images, labels):
        self.on_step_begin()
        output = self.model(images)
        loss = nn.functional.cross_entropy(output, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.global_step += 1
        return {"loss": loss.detach()}


torch.manual_seed(0)
trainer = Trainer()
logs = [trainer.step(torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4,))) for _ in range(8)]
