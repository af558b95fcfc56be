"""A stateful LSTM that keeps its state on itself, and detaches it at the beginning of an epoch only."""

import torch
from torch import nn


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.fc = nn.Linear(6, 1)
        self.state = None

    def reset(self):
        self.state = None

    def forward(self, x):
        # + if self.state is not None:
        # +     self.state = tuple(s.detach() for s in self.state)
        out, self.state = self.lstm(x, self.state)  # <- save
        return self.fc(out)


torch.manual_seed(0)
net = Stateful()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
windows = torch.randn(3, 2, 5, 4)
for epoch in range(3):
    net.reset()
    for i, x in enumerate(windows):
        if epoch == 0:
            net.reset()
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()  # <- write
