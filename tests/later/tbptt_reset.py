"""Truncated backpropagation; at the end of an episode the state of finished rows is reset in place."""

import torch
from torch import nn

torch.manual_seed(0)


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(5, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 1)

    def step(self, x, h):
        return torch.tanh(self.inp(x) + self.rec(h))

    def forward(self, xs, h, done):
        losses = []
        for x, over in zip(xs, done):
            h = self.step(x, h)
            losses.append(self.out(h).square().mean())  # <- save
            if over.any():
                h[over] = 0.0  # <- write
                # -
                # + h = h.masked_fill(over[:, None], 0.0)
        return torch.stack(losses).mean(), h


model = Memory()
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
hidden = torch.zeros(3, 8)
for chunk in range(8):
    xs = torch.randn(4, 3, 5)
    done = torch.zeros(4, 3, dtype=torch.bool)
    if chunk % 4 == 3:
        done[1, 2] = True
    loss, hidden = model(xs, hidden.detach(), done)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
