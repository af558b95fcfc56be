"""Two heads on a shared trunk: from the third epoch on, each head's optimizer steps by itself."""

import torch
from torch import nn

torch.manual_seed(0)
trunk = nn.Sequential(nn.Linear(5, 10), nn.ReLU())
left, right = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(10, 1)
opt_left = torch.optim.SGD([*trunk.parameters(), *left.parameters()], lr=0.01)
opt_right = torch.optim.SGD([*left.parameters(), *right.parameters()], lr=0.01)
for epoch in range(5):
    for _ in range(2):
        features = trunk(torch.randn(6, 5))
        a = left(features).square().mean()  # <- save
        b = (right(features) + 0.1 * left(features)).abs().mean()
        opt_left.zero_grad()
        opt_right.zero_grad()
        if epoch < 2:
            (a + b).backward()
            opt_left.step()
            opt_right.step()
        else:
            # + a.backward(retain_graph=True)
            b.backward(retain_graph=True)
            opt_right.step()  # <- write
            a.backward()
            # -
            opt_left.step()
