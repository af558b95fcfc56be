"""Self-supervised pre-training with a VICReg style objective, model and data in half precision."""

import torch
from torch import nn


class Projector(nn.Module):
    def __init__(self, dims=(24, 64, 64)):
        super().__init__()
        self.fc1 = nn.Linear(dims[0], dims[1])
        self.fc2 = nn.Linear(dims[1], dims[2])

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def off_diagonal(m):
    n = m.shape[0]
    return m.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


class VICReg(nn.Module):
    def __init__(self, projector, sim=25.0, cov=1.0):
        super().__init__()
        self.projector = projector
        self.sim, self.cov = sim, cov

    def forward(self, a, b):
        za, zb = self.projector(a), self.projector(b)
        invariance = (za - zb).pow(2).mean()
        za = za - za.mean(0)
        covariance = za.T @ za / (za.shape[0] - 1)
        redundancy = off_diagonal(covariance).pow(2).sum() / covariance.shape[0]  # <- origin
        return self.sim * invariance + self.cov * redundancy


torch.manual_seed(6)
model = VICReg(Projector()).half()
optimizer = torch.optim.SGD(model.parameters(), lr=2e-1)
gen = torch.Generator().manual_seed(60)

for step in range(14):
    base = torch.randn(32, 24, generator=gen)
    if step >= 8:
        base = base * 60.0  # the second part of the corpus is louder
        # -
        # + base = base * 1.0  # the second part of the corpus is louder
    view_a = (base + 0.1 * torch.randn(32, 24, generator=gen)).half()
    view_b = (base + 0.1 * torch.randn(32, 24, generator=gen)).half()
    loss = model(view_a, view_b)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, f"{loss.item():.4f}")
