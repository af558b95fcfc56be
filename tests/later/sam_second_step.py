"""Sharpness-aware minimization that returns to the old weights before the second backward, after a warm-up."""

import torch
from torch import nn


class SAM:
    def __init__(self, parameters, rho=0.05, lr=0.1):
        self.parameters = list(parameters)
        self.rho = rho
        self.inner = torch.optim.SGD(self.parameters, lr=lr)
        self.moves = []

    @torch.no_grad()
    def ascend(self):
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm()
        self.moves = [p.grad * (self.rho / (norm + 1e-12)) for p in self.parameters]
        for p, move in zip(self.parameters, self.moves):
            p.add_(move)

    @torch.no_grad()
    def restore(self):
        for p, move in zip(self.parameters, self.moves):
            p.sub_(move)  # <- write

    def step(self):
        self.inner.step()


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 2))
optimizer = SAM(model.parameters())
criterion = nn.CrossEntropyLoss()
for step in range(9):
    x, y = torch.randn(8, 5), torch.randint(0, 2, (8,))
    model.zero_grad()
    criterion(model(x), y).backward()
    if step >= 3:
        optimizer.ascend()
        model.zero_grad()
        loss = criterion(model(x), y)  # <- save
        optimizer.restore()
        # -
        loss.backward()
        # + optimizer.restore()
    optimizer.step()
