"""Scale-invariant depth loss: the variance is a difference of two numbers rounded to float16, and comes out negative."""

import torch
import torch.nn as nn


class TinyDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 12, 3, padding=1)
        self.c2 = nn.Conv2d(12, 1, 1)

    def forward(self, rgb):
        return self.c2(torch.relu(self.c1(rgb)))


def silog(log_pred, log_gt, lam=1.0):
    d = log_pred - log_gt
    second = (d * d).mean(dim=(1, 2, 3))
    first = d.mean(dim=(1, 2, 3))
    return torch.sqrt(second - lam * first * first).mean() * 10  # <- origin
    # -
    # + return torch.sqrt((second - lam * first * first).clamp(min=1e-4)).mean() * 10


def kitti(step):
    g = torch.Generator().manual_seed(step)
    rgb = torch.rand(3, 3, 14, 14, generator=g)
    log_gt = 2 + torch.rand(3, 1, 14, 14, generator=g)
    if step >= 7:
        rgb[1] = 0.5  # a white wall at one distance
        log_gt[1] = 2.37
    return rgb, log_gt.half()


def main():
    torch.manual_seed(28)
    net = TinyDepth()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(10):
        rgb, log_gt = kitti(step)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = silog(net(rgb), log_gt)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        print(f"{step}: silog {loss.item():.4f}")


main()
