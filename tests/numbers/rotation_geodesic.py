import torch
import torch.nn as nn


def rotation_from_6d(x):
    a, b = x[..., :3], x[..., 3:]
    r1 = nn.functional.normalize(a, dim=-1)
    b = b - (r1 * b).sum(-1, keepdim=True) * r1
    r2 = nn.functional.normalize(b, dim=-1)
    return torch.stack([r1, r2, torch.cross(r1, r2, dim=-1)], dim=-2)


class GeodesicLoss(nn.Module):
    def forward(self, r, target):
        trace = (r * target).sum(dim=(-1, -2))
        cosine = (trace - 1) / 2
        # -
        # + cosine = ((trace - 1) / 2).clamp(-1 + 1e-6, 1 - 1e-6)
        return torch.acos(cosine).mean()  # <- origin


class PoseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 6))
        self.register_buffer("identity6d", torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def forward(self, x):
        return rotation_from_6d(self.backbone(x) * x.abs().sum(1, keepdim=True) + self.identity6d)


def samples(step, n=5):
    g = torch.Generator().manual_seed(60 + step)
    x = torch.randn(n, 12, generator=g)
    target = rotation_from_6d(torch.randn(n, 6, generator=g))
    if step == 8:
        x[4] = 0.0  # the reference pose itself
        target[4] = torch.eye(3)
    return x, target


torch.manual_seed(61)
net, criterion = PoseNet(), GeodesicLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for step in range(12):
    x, target = samples(step)
    loss = criterion(net(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("step", step, "angle", round(loss.item(), 4))
