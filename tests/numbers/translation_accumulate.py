"""Sequence autoencoder, gradients accumulated over four micro-batches."""

import torch
import torch.nn as nn
import torch.nn.functional as F

ACCUMULATE = 4


class GatedUnit(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x):
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(a * b)  # <- origin


class Autoencoder(nn.Module):
    def __init__(self, dim=20):
        super().__init__()
        self.first = GatedUnit(dim)
        self.second = GatedUnit(dim)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def main():
    torch.manual_seed(26)
    g = torch.Generator().manual_seed(27)
    model = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    for micro in range(24):
        x = torch.randn(6, 20, generator=g)
        if micro == 14:
            x[4] *= 700.0
            # -
            # + x[4] *= 7.0
        with torch.autocast("cpu", dtype=torch.float16):
            reconstruction = model(x)
            loss = F.smooth_l1_loss(reconstruction, x) / ACCUMULATE
        scaler.scale(loss).backward()
        if (micro + 1) % ACCUMULATE == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            print(f"update {micro // ACCUMULATE} loss {loss.item() * ACCUMULATE:.4f}")


main()
