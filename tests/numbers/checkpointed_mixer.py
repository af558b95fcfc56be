"""MLP-Mixer whose blocks are recomputed in backward to save memory."""

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint


class MixerBlock(nn.Module):
    def __init__(self, tokens, dim):
        super().__init__()
        self.token_mix = nn.Linear(tokens, tokens)
        self.channel_mix = nn.Linear(dim, dim)

    def forward(self, x):
        x = x + self.token_mix(x.transpose(1, 2)).transpose(1, 2)
        gate = self.channel_mix(x)
        return x + gate * x  # <- origin


class Mixer(nn.Module):
    def __init__(self, depth=4, tokens=10, dim=16):
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(MixerBlock(tokens, dim) for _ in range(depth))
        self.head = nn.Linear(dim, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.float().mean(1).tanh())


def tokens(step, n=6):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(n, 10, 16, generator=g)
    if step >= 15:
        x[1] *= 40.0
        # -
        # + x[1] *= 1.0
    return x, torch.randint(0, 4, (n,), generator=g)


def train():
    torch.manual_seed(18)
    mixer = Mixer()
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    opt = torch.optim.AdamW(mixer.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(18):
        x, y = tokens(step)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = mixer(x)
        loss = loss_fn(logits, y)
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        print(f"{step} {loss.item():.4f} {scaler.get_scale()}")


train()
