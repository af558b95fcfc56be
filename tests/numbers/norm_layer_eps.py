import torch
import torch.nn as nn
import torch.nn.functional as F


class ChannelNorm(nn.Module):
    """Per-sample standardisation of each channel over time."""

    def __init__(self, channels, eps=1e-8):
        # -
        # + def __init__(self, channels, eps=1e-4):
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).square().mean(-1, keepdim=True)
        std = torch.sqrt(var + self.eps)
        return self.gain * (x - mean) / std  # <- origin


class WearableNet(nn.Module):
    def __init__(self, channels=4, classes=3):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv1d(channels, 16, 7, stride=2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = F.relu(self.conv(self.norm(x)))
        return self.fc(x.amax(-1))


def windows(n=60, batch=5):
    gen = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, 50, generator=gen).half()
    y = torch.randint(0, 3, (n,), generator=gen)
    x[38, 1] = 0.25  # the sensor came loose: a constant channel
    for i in range(0, n, batch):
        yield x[i : i + batch], y[i : i + batch]


torch.manual_seed(2)
model = WearableNet().half()
optimizer = torch.optim.SGD(model.parameters(), lr=2e-2)
for step, (x, y) in enumerate(windows()):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{step}: {loss.item():.4f}")
