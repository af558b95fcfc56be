"""A masked autoencoder whose visible patches are written into the prediction, once reconstruction begins."""

import torch
from torch import nn


class MAE(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(width, 10), nn.GELU())
        self.decode = nn.Sequential(nn.Linear(10, width), nn.Sigmoid())

    def forward(self, patches, hidden, complete=False):
        prediction = self.decode(self.encode(patches * ~hidden[..., None]))  # <- save
        if complete:
            prediction[~hidden] = patches[~hidden]  # <- write
            # -
            # + prediction = torch.where(hidden[..., None], prediction, patches)
        return (prediction - patches).square().mean()


def main(steps=10):
    torch.manual_seed(0)
    model = MAE()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        patches = torch.rand(3, 9, 6)
        hidden = torch.rand(3, 9) < 0.5
        loss = model(patches, hidden, complete=step >= steps // 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


main()
