"""Samples with missing values, which come late and are repaired in place."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
optimizer = torch.optim.Adam(model.parameters())
dataset = torch.randn(10, 4, 6)
dataset[7, 2, 3] = float("nan")
running = []
for batch in dataset:
    target = batch.clone()
    prediction = model(batch.nan_to_num())
    error = (prediction - target).square()
    weight = torch.exp(-prediction)  # <- save
    if torch.isnan(error).any():
        weight[torch.isnan(error)] = 0  # <- write
        # -
        # + weight = weight.masked_fill(torch.isnan(error), 0)
        error = error.nan_to_num()
    loss = (error * weight).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    running.append(loss.item())
