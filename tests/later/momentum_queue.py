"""Momentum contrast: the queue of keys is written before backward has used it, once it takes part in the loss."""

import torch
from torch import nn
from torch.nn import functional as F


class Contrast(nn.Module):
    def __init__(self, width=8, size=32):
        super().__init__()
        self.encoder = nn.Linear(10, width)
        self.register_buffer("queue", F.normalize(torch.randn(width, size), dim=0))
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, keys):
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.t()  # <- write
        self.pointer = (self.pointer + len(keys)) % self.queue.size(1)

    def forward(self, a, b, use_queue):
        q, k = F.normalize(self.encoder(a), dim=1), F.normalize(self.encoder(b), dim=1).detach()
        positive = (q * k).sum(1, keepdim=True)
        if use_queue:
            logits = torch.cat([positive, q @ self.queue], 1)  # <- save
            # -
            # + logits = torch.cat([positive, q @ self.queue.clone()], 1)
        else:
            logits = torch.cat([positive, q @ k.t()], 1)
        self.enqueue(k)
        return F.cross_entropy(logits / 0.1, torch.zeros(len(a), dtype=torch.long))


torch.manual_seed(0)
model = Contrast()
optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
for step in range(12):
    x = torch.randn(8, 10)
    loss = model(x, x + 0.05 * torch.randn_like(x), use_queue=step >= 4)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
