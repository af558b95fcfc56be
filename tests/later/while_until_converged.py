"""A while loop that refines its output from a given step on."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.Softplus(), nn.Conv1d(6, 2, 3, padding=1))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
signal = torch.randn(4, 2, 16)
step, best = 0, float("inf")
while step < 30 and best > 1e-4:
    estimate = model(signal)
    residual = torch.exp(-(estimate - signal).square())  # <- save
    if step > 10:
        residual.sub_(1.0)  # <- write
        # -
        # + residual = residual - 1.0
    loss = residual.abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    best = min(best, loss.item())
    step += 1
