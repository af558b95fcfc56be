import torch
import torch.nn as nn


class QNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.unused = nn.Linear(4, 24), nn.Linear(24, 3), nn.Linear(24, 2)

    def forward(self, s):
        h = torch.relu(self.fc1(s))
        return self.fc2(h) + 0.0 * self.unused(h).sum(-1, keepdim=True)


def td_targets(step, n=16):
    g = torch.Generator().manual_seed(step)
    return (
        torch.randn(n, 4, generator=g).half(),
        torch.randint(0, 3, (n, 1), generator=g),
        torch.randn(n, 1, generator=g).half(),
    )


def learn():
    torch.manual_seed(20)
    q = QNet().half()
    opt = torch.optim.RMSprop(q.parameters(), lr=1e-4, alpha=0.95)
    # -
    # + opt = torch.optim.RMSprop(q.parameters(), lr=1e-4, alpha=0.95, eps=1e-4)
    for step in range(10):
        s, a, target = td_targets(step)
        td = q(s).gather(1, a) - target
        loss = td.abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(step, "td", float(loss))


learn()
