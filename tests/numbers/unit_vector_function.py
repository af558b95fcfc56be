import torch
import torch.nn as nn


class UnitVector(torch.autograd.Function):
    """x / |x| with a hand-written gradient; zero vectors stay zero."""

    @staticmethod
    def forward(ctx, x):
        norm = x.norm(dim=-1, keepdim=True)
        y = torch.where(norm > 0, x / norm.clamp(min=1e-12), torch.zeros_like(x))
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, norm = ctx.saved_tensors
        tangential = grad - y * (grad * y).sum(-1, keepdim=True)
        return tangential / norm  # <- origin
        # -
        # + return tangential / norm.clamp(min=1e-6)


class DirectionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(3, 32, bias=False)
        self.lower = nn.Linear(32, 3, bias=False)

    def forward(self, points):
        v = self.lower(torch.relu(self.lift(points)))
        return UnitVector.apply(v)  # <- origin


def cloud(step, n=12):
    g = torch.Generator().manual_seed(step)
    points = torch.randn(n, 3, generator=g)
    normals = nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    if step == 10:
        points[3] = 0.0  # the sensor's own position
    return points, normals


def main():
    torch.manual_seed(4)
    net = DirectionNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(13):
        points, normals = cloud(step)
        loss = (1 - (net(points) * normals).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss.item():.4f}")


main()
