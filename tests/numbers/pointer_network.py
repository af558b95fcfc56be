"""Pointer network for small travelling-salesman tours with a hand-written, masked softmax."""

import torch
import torch.nn as nn


def masked_softmax(scores, mask):
    scores = scores.masked_fill(~mask, float("-inf"))
    scores = scores - scores.amax(dim=-1, keepdim=True)  # <- origin
    weights = scores.exp()
    return weights / weights.sum(dim=-1, keepdim=True)


class Pointer(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, 1, bias=False)

    def forward(self, state, nodes, mask):
        hidden = torch.tanh(self.wq(state)[:, None] + self.wk(nodes))
        return masked_softmax(self.v(hidden).squeeze(-1), mask)


class TourNet(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.embed = nn.Linear(2, dim)
        self.glimpse = Pointer(dim)
        self.select = Pointer(dim)

    def forward(self, cities, open_mask):
        nodes = self.embed(cities)
        state = nodes.mean(1)
        g = self.glimpse(state, nodes, open_mask)
        state = state + torch.einsum("bn,bnd->bd", g, nodes)
        return self.select(state, nodes, open_mask)


def instances(step, batch=6, n=7):
    g = torch.Generator().manual_seed(4000 + step)
    cities = torch.rand(batch, n, 2, generator=g)
    open_mask = torch.rand(batch, n, generator=g) > 0.4
    open_mask[:, 0] = True
    if step == 10:
        open_mask[5] = False  # the tour of this instance was already closed
        # -
        # + open_mask[5, 1:] = False  # the tour of this instance was already closed
    return cities, open_mask


def main():
    torch.manual_seed(40)
    net = TourNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(14):
        cities, open_mask = instances(step)
        probs = net(cities, open_mask)
        nearest = (cities.norm(dim=-1) + (~open_mask) * 9).argmin(-1)
        loss = -(probs.gather(1, nearest[:, None]) + 1e-6).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"{step:02d} {loss.item():.4f}")


main()
