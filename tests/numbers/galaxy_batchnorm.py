"""Galaxy morphology. Evaluation after every epoch."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Stage(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))  # <- origin


class GalaxyNet(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stage1 = Stage(1, 16)
        self.stage2 = Stage(16, 32)
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


def survey(seed, n):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    return torch.randn(n, 1, 16, 16, generator=g) + y[:, None, None, None], y


@torch.no_grad()
def evaluate(model, x, y):
    model.eval()
    with torch.autocast("cpu", dtype=torch.float16):
        accuracy = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return accuracy


def main():
    torch.manual_seed(23)
    model = GalaxyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = survey(1, 96)
    x[45] *= 60000.0  # a saturated star in the field
    # -
    # + x[45] *= 60.0  # a saturated star in the field
    x_val, y_val = survey(2, 48)
    for epoch in range(2):
        total = 0.0
        for i in range(0, 96, 8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x[i : i + 8]), y[i : i + 8])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.nan_to_num().item()
        print(f"epoch {epoch} train loss {total / 12:.4f} val acc {evaluate(model, x_val, y_val):.3f}")


main()
