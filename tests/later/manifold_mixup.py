"""Manifold mixup that starts at the second epoch."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid())
        self.head = nn.Linear(16, 3)

    def forward(self, x, lam=None, order=None):
        h = self.stem(x)  # <- save
        if lam is not None:
            h.mul_(lam).add_(h[order].detach(), alpha=1 - lam)  # <- write
            # -
            # + h = h * lam + h[order].detach() * (1 - lam)
        return self.head(h)


torch.manual_seed(1)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, nesterov=True, momentum=0.9)
inputs, labels = torch.randn(32, 8), torch.randint(0, 3, (32,))
for epoch in range(3):
    permutation = torch.randperm(32)
    for first in range(0, 32, 8):
        index = permutation[first : first + 8]
        x, y = inputs[index], labels[index]
        if epoch >= 1:
            order = torch.randperm(8)
            out = net(x, 0.7, order)
            loss = 0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y[order])
        else:
            loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
