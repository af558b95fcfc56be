"""Contrastive training over a generator of pairs; later pairs are normalised without an extra tensor."""

import torch
from torch import nn
from torch.nn import functional as F


def pairs(count):
    for index in range(count):
        x = torch.randn(6, 10)
        yield index, x, x + 0.1 * torch.randn_like(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 16), nn.ELU(), nn.Linear(16, 8), nn.Tanh())

    def forward(self, x):
        return self.net(x)  # <- save


torch.manual_seed(0)
encoder = Encoder()
optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
for index, a, b in pairs(15):
    za, zb = encoder(a), encoder(b)
    if index >= 7:
        za /= za.norm(dim=1, keepdim=True).detach()  # <- write
        # -
        # + za = za / za.norm(dim=1, keepdim=True).detach()
        zb = F.normalize(zb, dim=1)
    loss = F.cross_entropy(za @ zb.t() / 0.2, torch.arange(6))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
