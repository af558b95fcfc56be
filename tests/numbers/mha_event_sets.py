import torch
from torch import nn


class EventBlock(nn.Module):
    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x, padding):
        attended, weights = self.self_attn(x, x, x, key_padding_mask=padding)  # <- origin
        return self.norm(x + attended), weights


class EventClassifier(nn.Module):
    """Sets of detector hits; a set may have any number of hits."""

    def __init__(self, features=6, dim=32):
        super().__init__()
        self.inp = nn.Linear(features, dim)
        self.blocks = nn.ModuleList([EventBlock(dim) for _ in range(2)])
        self.out = nn.Linear(dim, 2)

    def forward(self, hits, padding):
        x = self.inp(hits)
        for block in self.blocks:
            x, _ = block(x, padding)
        keep = (~padding).unsqueeze(-1)
        x = torch.where(keep, x, torch.zeros_like(x)).sum(1) / keep.sum(1).clamp(min=1)
        return self.out(x)


def events(batch_index, size=8, hits=10):
    g = torch.Generator().manual_seed(batch_index)
    x = torch.randn(size, hits, 6, generator=g)
    n = torch.randint(1, hits + 1, (size,), generator=g)
    if batch_index == 7:
        n[0] = 0
        n[6] = 0
    padding = torch.arange(hits)[None] >= n[:, None]
    # -
    # + padding = torch.arange(hits)[None] >= n[:, None].clamp(min=1)
    return x, padding, torch.randint(0, 2, (size,), generator=g)


def fit():
    torch.manual_seed(33)
    net = EventClassifier()
    criterion = nn.CrossEntropyLoss()
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for b in range(11):
        x, padding, y = events(b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x, padding)
        loss = criterion(logits.float(), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        print("batch", b, "loss", loss.item())


fit()
