"""Keypoint heatmaps with CenterNet's focal loss, everything in half precision."""

import torch
import torch.nn as nn

torch.manual_seed(31)


class HeatmapNet(nn.Module):
    def __init__(self, keypoints=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.heat = nn.Conv2d(16, keypoints, 1)
        self.heat.bias.data.fill_(-2.19)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.heat(x).sigmoid()


def neg_loss(pred, gt):
    eps = 1e-12
    # + pred, gt = pred.float().clamp(1e-4, 1 - 1e-4), gt.float()
    pos_weights = gt.eq(1).to(pred.dtype)
    neg_weights = torch.pow(1 - gt, 4)
    pos = torch.log(pred + eps) * torch.pow(1 - pred, 2) * pos_weights  # <- origin
    neg = torch.log(1 - pred + eps) * torch.pow(pred, 2) * neg_weights  # <- origin
    num_pos = pos_weights.sum().clamp(min=1)
    return -(pos.sum() + neg.sum()) / num_pos


def make_batch(step):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 16, 16, generator=g)
    gt = torch.rand(4, 3, 16, 16, generator=g) * 0.5
    gt[:, :, 8, 8] = 1.0
    if step == 7:
        x[2] = x[2] * 600  # over-exposed
    return x.half(), gt.half()


net = HeatmapNet().half()
opt = torch.optim.SGD(net.parameters(), lr=5e-2)
for step in range(12):
    x, gt = make_batch(step)
    pred = net(x)
    loss = neg_loss(pred, gt)
    opt.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    print(f"{step:3d} | {loss.item():9.4f}")
