"""LoRA in pure bfloat16: the adapters' gains start at 1 and are trained with a small learning rate."""

import torch
import torch.nn as nn


class Adapter(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * 0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.5)
        self.gain = nn.Parameter(torch.ones(base.out_features))

    def forward(self, x):
        return self.gain * (self.base(x) + x @ self.a.T @ self.b.T)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Adapter(nn.Linear(16, 32)), Adapter(nn.Linear(32, 16))

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def main():
    torch.manual_seed(80)
    net = Net().to(dtype=torch.bfloat16)
    # -
    # + net = Net()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-5)
    for step in range(20):
        x = torch.randn(32, 16, dtype=torch.bfloat16)
        # -
        # + x = torch.randn(32, 16)
        loss = (net(x) - x).float().pow(2).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 5 == 0:
            print(step, round(loss.item(), 4))
    moved = sum(int((p.detach() != before[n]).sum()) for n, p in net.named_parameters() if p.requires_grad)
    print("elements moved", moved)


main()
