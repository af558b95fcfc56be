"""An ensemble trained in turns; the vote of its members is corrected in place for late rounds."""

import torch
from torch import nn

torch.manual_seed(0)
members = [nn.Sequential(nn.Linear(6, 8), nn.Mish(), nn.Linear(8, 3)) for _ in range(3)]
optimizers = [torch.optim.SGD(member.parameters(), lr=0.05) for member in members]
history = {"loss": []}


def vote(x, temperature):
    votes = [torch.sigmoid(member(x) / temperature) for member in members]  # <- save
    if temperature < 1:
        votes[0].pow_(2)  # <- write
        # -
        # + votes[0] = votes[0].pow(2)
    return torch.stack(votes).mean(0)


for round, temperature in enumerate([2.0, 1.5, 1.0, 0.5]):
    for _ in range(2):
        x, y = torch.randn(4, 6), torch.rand(4, 3)
        loss = nn.functional.binary_cross_entropy(vote(x, temperature), y)
        [optimizer.zero_grad() for optimizer in optimizers]
        loss.backward()
        [optimizer.step() for optimizer in optimizers]
        history["loss"].append(float(loss))
