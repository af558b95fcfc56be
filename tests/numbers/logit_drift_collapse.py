"""A classifier whose features are multiplied by a learned temperature that runs away."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class TemperatureHead(nn.Module):
    def __init__(self, dim, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) * 0.2)
        self.log_scale = nn.Parameter(torch.tensor(6.0))

    def forward(self, z):
        return F.linear(z * self.log_scale.exp(), self.weight)  # <- origin


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64))
        self.head = TemperatureHead(64, 5)

    def forward(self, x):
        return self.head(self.body(x))


class Loop:
    def __init__(self):
        torch.manual_seed(14)
        self.model = Model()
        self.optimizer = torch.optim.SGD(
            [
                {"params": self.model.body.parameters(), "lr": 1e-6},
                {"params": [self.model.head.weight], "lr": 1e-6},
            ],
            lr=1e-6,
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10_000)

    def fit(self, steps):
        for step in range(steps):
            g = torch.Generator().manual_seed(step)
            x, y = torch.randn(16, 20, generator=g), torch.randint(0, 5, (16,), generator=g)
            with torch.no_grad():  # a schedule sharpens the softmax
                self.model.head.log_scale += 0.8
                # -
                # + self.model.head.log_scale.add_(0.8).clamp_(max=6.0)
            self.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(self.model(x), y)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            print(f"step {step} loss {loss.item():.3f} scale {self.scaler.get_scale()}")


Loop().fit(18)
