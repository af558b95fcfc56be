"""Segmentation with an averaged copy of the model; the copy is what gets evaluated."""

import copy
import torch
import torch.nn as nn
import torch.nn.functional as F


class Seg(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.c2 = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        y = self.c1(x)
        y = y * y.abs()  # <- origin
        return self.c2(F.relu(self.b1(y)))


class EMA:
    def __init__(self, model, decay=0.9):
        self.module, self.decay = copy.deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        for (k, e), m in zip(self.module.state_dict().items(), model.state_dict().values()):
            if e.dtype.is_floating_point:
                e.mul_(self.decay).add_(m, alpha=1 - self.decay)


def tiles(i):
    g = torch.Generator().manual_seed(i)
    x = torch.randn(2, 3, 12, 12, generator=g)
    if i == 4:
        x[1] += 700.0  # clouds
        # -
        # + x[1] += 0.7  # clouds
    return x, (x.sum(1) > 0).long()


def main():
    torch.manual_seed(35)
    model = Seg()
    ema = EMA(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for i in range(10):
        x, y = tiles(i)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        ema.update(model)
        if torch.isfinite(loss):
            print(i, f"{loss.item():.4f}")
    with torch.no_grad():
        x, y = tiles(100)
        print("ema accuracy", (ema.module(x).argmax(1) == y).float().mean().item())


main()
