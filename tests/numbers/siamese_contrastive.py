import torch
import torch.nn as nn


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 6))

    def forward(self, x):
        return self.net(x)


class ContrastiveLoss(nn.Module):
    def __init__(self, margin=1.0):
        super().__init__()
        self.margin = margin

    def forward(self, a, b, same):
        distance = torch.sqrt(((a - b) ** 2).sum(dim=1))  # <- origin
        # -
        # + distance = torch.sqrt(((a - b) ** 2).sum(dim=1) + 1e-12)
        positive = same * distance**2
        negative = (1 - same) * torch.relu(self.margin - distance) ** 2
        return 0.5 * (positive + negative).mean()


def pairs(step, n=8):
    gen = torch.Generator().manual_seed(900 + step)
    left, right = torch.randn(n, 10, generator=gen), torch.randn(n, 10, generator=gen)
    same = (torch.rand(n, generator=gen) > 0.5).float()
    if step == 11:
        right[6] = left[6]  # the same photograph was listed twice
        same[6] = 1.0
    return left, right, same


def main():
    torch.manual_seed(90)
    branch = Branch()
    criterion = ContrastiveLoss()
    optimizer = torch.optim.RMSprop(branch.parameters(), lr=1e-3)
    for step in range(15):
        left, right, same = pairs(step)
        loss = criterion(branch(left), branch(right), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:2d}: {loss.item():.5f}")


main()
