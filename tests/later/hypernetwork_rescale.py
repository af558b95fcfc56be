"""A hypernetwork whose generated weights are normalised when their norm grows beyond a bound."""

import torch
from torch import nn


class Hyper(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.randn(3) * 0.1)
        self.make = nn.Linear(3, 12)

    def forward(self, x, bound):
        weight = torch.sinh(self.make(self.code)).exp()  # <- save
        norm = weight.detach().norm()
        if norm > bound:
            weight *= bound / norm  # <- write
            # -
            # + weight = weight * (bound / norm)
        return x @ weight.view(4, 3)


torch.manual_seed(0)
hyper = Hyper()
optimizer = torch.optim.Adam(hyper.parameters(), lr=0.05)
bounds = iter([100.0, 100.0, 100.0, 1.0, 1.0])
while (bound := next(bounds, None)) is not None:
    loss = (hyper(torch.randn(5, 4), bound) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
