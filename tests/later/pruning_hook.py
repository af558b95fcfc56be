"""A forward hook, registered in the middle of training, that prunes activations in place."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential()
model.add_module("fc1", nn.Linear(6, 10))
model.add_module("act", nn.Sigmoid())
model.add_module("fc2", nn.Linear(10, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
keep = torch.ones(10)


def prune(module, args, output):
    output.mul_(keep)  # <- write
    # -
    # + return output * keep


for epoch in range(4):
    if epoch == 2:
        keep[::2] = 0
        model.act.register_forward_hook(prune)
    for _ in range(3):
        loss = model(torch.randn(5, 6)).square().sum()  # <- save
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
