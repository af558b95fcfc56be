"""Mixture density network with a hand-written Gaussian; probabilities underflow."""

import math
import torch
from torch import nn


class MDN(nn.Module):
    def __init__(self, k=4):
        super().__init__()
        self.trunk = nn.Linear(1, 24)
        self.pi, self.mu, self.sigma = nn.Linear(24, k), nn.Linear(24, k), nn.Linear(24, k)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.pi(h).softmax(-1), self.mu(h), nn.functional.softplus(self.sigma(h)) + 0.05


def gaussian(y, mu, sigma):
    return torch.exp(-0.5 * ((y - mu) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def mdn_loss(pi, mu, sigma, y):
    likelihood = (pi * gaussian(y, mu, sigma)).sum(-1)
    return -torch.log(likelihood).mean()  # <- origin
    # -
    # + return -torch.log(likelihood.clamp(min=1e-30)).mean()


def toy(i, n=12):
    g = torch.Generator().manual_seed(i)
    y = torch.rand(n, 1, generator=g)
    x = y + 0.3 * torch.sin(6 * y)
    if i == 13:
        y[10] = 60.0  # a typing error in the table
    return x, y


class Fitter(object):
    def __init__(self, model, lr=1e-3):
        self.model, self.opt = model, torch.optim.Adam(model.parameters(), lr=lr)

    def one(self, x, y):
        loss = mdn_loss(*self.model(x), y)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return float(loss)


torch.manual_seed(17)
fitter = Fitter(MDN())
print([round(fitter.one(*toy(i)), 3) for i in range(16)])
