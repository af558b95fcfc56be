"""ArcFace-like margin: the sine is sqrt(1 - cos^2), whose derivative is infinite where cos is 1."""

import math
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, normalize


class ArcMargin(nn.Module):
    def __init__(self, dim, classes, s=8.0, m=0.3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim))
        self.s, self.cos_m, self.sin_m = s, math.cos(m), math.sin(m)

    def forward(self, z, label):
        cosine = linear(normalize(z), normalize(self.weight))
        sine = (1.0 - cosine * cosine).sqrt()  # <- origin
        # -
        # + sine = (1.0 - cosine * cosine).clamp(min=1e-6).sqrt()
        phi = cosine * self.cos_m - sine * self.sin_m
        hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1.0)
        return self.s * (hot * phi + (1 - hot) * cosine)


class Faces(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(20, 8, bias=False)
        self.margin = ArcMargin(8, 6)

    def forward(self, x, y):
        return self.margin(self.backbone(x), y)


def people(t):
    g = torch.Generator().manual_seed(t)
    return torch.randn(10, 20, generator=g), torch.randint(0, 6, (10,), generator=g)


def main():
    torch.manual_seed(55)
    net = Faces()
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    for t in range(14):
        x, y = people(t)
        if t == 9:
            with torch.no_grad():  # a new identity is enrolled from one of its pictures
                net.margin.weight[3] = net.backbone(x[5])
            y[5] = 3
        loss = cross_entropy(net(x, y), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(t, "arc", round(loss.item(), 4))


main()
