"""Sequence tagger with padding mask: F.softmax over -inf filled scores."""

import math
import torch
import torch.nn as nn
import torch.nn.functional as F


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, dim * 3)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, pad_mask):
        b, t, d = x.shape
        q, k, v = self.to_qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)
        scores = scores.masked_fill(pad_mask[:, None, None, :], float("-inf"))
        weights = F.softmax(scores, dim=-1)  # <- origin
        out = (weights @ v).transpose(1, 2).reshape(b, t, d)
        return self.to_out(out)


class Tagger(nn.Module):
    def __init__(self, vocab=50, dim=32, tags=7):
        super().__init__()
        self.tok = nn.Embedding(vocab, dim)
        self.attn1 = SelfAttention(dim, 4)
        self.attn2 = SelfAttention(dim, 4)
        self.norm = nn.LayerNorm(dim)
        self.tag = nn.Linear(dim, tags)

    def forward(self, tokens):
        pad = tokens == 0
        # + pad[:, 0] = False
        x = self.tok(tokens)
        x = x + self.attn1(x, pad)
        x = self.norm(x + self.attn2(x, pad))
        return self.tag(x)


def corpus(batches=10, batch=5, length=8):
    gen = torch.Generator().manual_seed(71)
    for b in range(batches):
        tokens = torch.randint(1, 50, (batch, length), generator=gen)
        tags = torch.randint(0, 7, (batch, length), generator=gen)
        lengths = torch.randint(3, length + 1, (batch,), generator=gen)
        if b == 6:
            lengths[2] = 0
        keep = torch.arange(length)[None] < lengths[:, None]
        yield tokens * keep, tags.masked_fill(~keep, -100)


def main():
    torch.manual_seed(70)
    model = Tagger()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    for i, (tokens, tags) in enumerate(corpus()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tags.flatten(), ignore_index=-100)
        opt.zero_grad()
        loss.backward()
        opt.step()
        print(i, loss.item())


main()
