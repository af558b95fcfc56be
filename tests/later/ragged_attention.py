"""Batches of different lengths; only a longer one is padded, and its padding masked after the softmax."""

import math

import torch
from torch import nn


class SelfAttention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = torch.softmax(q @ k.mT / math.sqrt(q.size(-1)), -1)  # <- save
        if mask is not None:
            weights.masked_fill_(mask[:, None], 0.0)  # <- write
            # -
            # + weights = weights.masked_fill(mask[:, None], 0.0)
        return self.proj(weights @ v)


def collate(lengths):
    longest = max(lengths)
    batch = torch.randn(len(lengths), longest, 8)
    if min(lengths) == longest:
        return batch, None
    return batch, torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]


torch.manual_seed(0)
layer = SelfAttention()
optimizer = torch.optim.Adam(layer.parameters())
for lengths in [(4, 4), (6, 6), (5, 5), (3, 7), (4, 4)]:
    batch, mask = collate(lengths)
    loss = layer(batch, mask).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
