"""Gradient accumulation whose last, shorter group rescales its losses in place."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
data = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(11)]
accumulate = 4

optimizer.zero_grad()
for i, (x, y) in enumerate(data):
    rmse = torch.sqrt((model(x) - y).square().mean() + 1e-6)  # <- save
    group = min(accumulate, len(data) - i // accumulate * accumulate)
    if group < accumulate:
        rmse /= group  # <- write
        # -
        # + rmse = rmse / group
        rmse.backward()
    else:
        (rmse / accumulate).backward()
    if (i + 1) % accumulate == 0 or i + 1 == len(data):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
