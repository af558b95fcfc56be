"""Averaged weights that are swapped in for the consistency term before backward has run."""

import torch
from torch import nn

torch.manual_seed(0)


class Averager:
    def __init__(self, module, start):
        self.module, self.start, self.count = module, start, 0
        self.mean = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self):
        self.count += 1
        for mean, p in zip(self.mean, self.module.parameters()):
            mean += (p - mean) / self.count

    @torch.no_grad()
    def pull(self, step):
        if step >= self.start:
            for mean, p in zip(self.mean, self.module.parameters()):
                p.copy_(0.9 * p + 0.1 * mean)  # <- write


model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
averager = Averager(model, start=6)
for step in range(10):
    x = torch.randn(7, 5)
    prediction = model(x)  # <- save
    averager.pull(step)
    # -
    loss = nn.functional.huber_loss(prediction, x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # + averager.pull(step)
    averager.update()
