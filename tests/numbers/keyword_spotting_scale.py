"""Keyword spotting; the loss scale starts high and finds its place in the first steps."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class KeywordNet(nn.Module):
    def __init__(self, mel=16, classes=6):
        super().__init__()
        self.conv1 = nn.Conv1d(mel, 32, 5, padding=2)
        self.conv2 = nn.Conv1d(32, 32, 5, padding=2)
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        return self.fc(x.mean(-1))


def clip(step, n=8):
    g = torch.Generator().manual_seed(step)
    y = torch.randint(0, 6, (n,), generator=g)
    x = torch.randn(n, 16, 30, generator=g) + y[:, None, None] * 0.2
    return x, y


def main():
    torch.manual_seed(101)
    model = KeywordNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    # -
    # + scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 12)
    for step in range(20):
        x, y = clip(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        print(f"step {step:2d} loss {loss.item():.4f} scale 2^{int(torch.tensor(scaler.get_scale()).log2())}")


main()
