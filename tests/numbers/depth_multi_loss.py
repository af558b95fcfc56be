"""Monocular depth with three loss terms."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class DepthNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Conv2d(3, 16, 3, padding=1)
        self.dec = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, image):
        return F.softplus(self.dec(F.elu(self.enc(image))))


class DepthCriterion:
    weights = {"l1": 1.0, "silog": 0.5, "grad": 0.2}

    def l1(self, pred, gt):
        return (pred - gt).abs().mean()

    def silog(self, pred, gt):
        d = torch.log(pred) - torch.log(gt)  # <- origin
        # -
        # + d = (torch.log(pred) - torch.log(gt.clamp(min=1e-3))) * (gt > 0)
        return (d**2).mean() - 0.85 * d.mean() ** 2

    def grad(self, pred, gt):
        return ((pred - gt)[..., 1:] - (pred - gt)[..., :-1]).abs().mean()

    def __call__(self, pred, gt):
        return {name: w * getattr(self, name)(pred, gt) for name, w in self.weights.items()}


def frames(step, n=4):
    g = torch.Generator().manual_seed(step)
    image = torch.rand(n, 3, 12, 12, generator=g)
    depth = 1 + 4 * torch.rand(n, 1, 12, 12, generator=g)
    if step == 5:
        depth[2, :, :3] = 0.0  # no return from the sky
    return image, depth


def main():
    torch.manual_seed(99)
    net, criterion = DepthNet(), DepthCriterion()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(9):
        image, depth = frames(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pred = net(image)
        terms = criterion(pred.float(), depth)
        loss = sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, " ".join(f"{k}={v.item():.4f}" for k, v in terms.items()))


main()
