"""An affine coupling flow with a learned linear mixing; log|det W| of a matrix that becomes singular."""

import torch
import torch.nn as nn


class InvertibleLinear(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.W = nn.Parameter(torch.linalg.qr(torch.randn(d, d))[0])

    def forward(self, x):
        det = torch.linalg.det(self.W)
        return x @ self.W.T, torch.log(det.abs()).expand(x.size(0))  # <- origin


class Coupling(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d // 2, 16), nn.Tanh(), nn.Linear(16, d))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        s, t = self.net(a).chunk(2, -1)
        s = torch.tanh(s)
        return torch.cat([a, b * s.exp() + t], -1), s.sum(-1)


class Flow(nn.Module):
    def __init__(self, d=4):
        super().__init__()
        self.steps = nn.ModuleList([InvertibleLinear(d), Coupling(d), InvertibleLinear(d), Coupling(d)])

    def log_prob(self, x):
        total = 0.0
        for s in self.steps:
            x, ld = s(x)
            total = total + ld
        return -0.5 * (x**2).sum(-1) + total

    def forward(self, x):
        return -self.log_prob(x).mean()


torch.manual_seed(31)
flow = Flow()
opt = torch.optim.SGD(flow.parameters(), lr=1e-2)
for epoch in range(8):
    if epoch == 5:
        with torch.no_grad():  # magnitude pruning of the second mixing matrix
            flow.steps[2].W[1].zero_()
            # -
            # + flow.steps[2].W[1].mul_(0.5)
    loss = flow(torch.randn(32, 4))
    opt.zero_grad()
    loss.backward()
    opt.step()
    print("epoch", epoch, "nll", round(loss.item(), 3))
