"""Tasks weighted by learned weights, which are rescaled to the number of tasks after a warm-up."""

import torch
from torch import nn


class Weighted(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(tasks))
        self.warm = False

    def forward(self, losses):
        weights = self.scores.softmax(0)  # <- save
        if self.warm:
            weights *= len(losses)  # <- write
            # -
            # + weights = weights * len(losses)
        return sum(w * one for w, one in zip(weights, losses))


torch.manual_seed(0)
trunk = nn.Linear(6, 10)
heads = nn.ModuleList(nn.Linear(10, 1) for _ in range(3))
weighted = Weighted(3)
optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters(), *weighted.parameters()], lr=1e-2)
for step in range(14):
    weighted.warm = step >= 9
    shared = torch.relu(trunk(torch.randn(8, 6)))
    losses = [(head(shared) - i).square().mean() for i, head in enumerate(heads)]
    loss = weighted(losses)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
