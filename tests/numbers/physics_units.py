"""A surrogate of a heat solver: the network's output is in units of 20 kK, the loss in kelvin."""

import torch
from torch import nn

KELVIN = 2.0e4


class Surrogate(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.readout = nn.Linear(64, 1)

    def forward(self, x):
        unit = self.readout(self.body(x)).squeeze(-1)
        return unit * KELVIN  # <- origin
        # -
        # + return unit.float() * KELVIN


def simulate(step, n=16):
    g = torch.Generator().manual_seed(step)
    x = torch.rand(n, 8, generator=g)
    kelvin = 300 + 50 * x.sum(1)
    if step == 9:
        kelvin[7] = 25000.0  # inside the arc
    return x, kelvin


def main():
    torch.manual_seed(1)
    model = Surrogate()
    nn.init.zeros_(model.readout.weight)
    nn.init.constant_(model.readout.bias, 0.025)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step in range(13):
        x, kelvin = simulate(step)
        with torch.autocast("cpu", dtype=torch.float16):
            pred = model(x)
            loss = ((pred.float() - kelvin) ** 2).mean() / 100
            # -
            # + loss = ((pred.float() - kelvin) ** 2).mean() / 1e6
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        print(f"step {step} mse {loss.item():.2f}")


main()
