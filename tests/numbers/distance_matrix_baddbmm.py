"""Triplet mining with |a|^2 + |b|^2 - 2ab computed by baddbmm under autocast."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(18, 48), nn.Linear(48, 24)

    def forward(self, x):
        return self.l2(F.elu(self.l1(x)))


def squared_distances(e):
    sq = (e.float() ** 2).sum(-1, keepdim=True)
    return torch.baddbmm(sq + sq.transpose(1, 2), e, e.transpose(1, 2), alpha=-2.0)  # <- origin


def hard_triplet(d, group, margin=0.5):
    same = group[:, :, None] == group[:, None, :]
    pos = (d * same).amax(-1)
    neg = (d + 100.0 * same).amin(-1)
    return F.relu(pos - neg + margin).mean()


def tracks(i):
    r = torch.Generator().manual_seed(i * 7 + 1)
    x = torch.randn(3, 8, 18, generator=r)
    if i == 8:
        x[2] = x[2] * 1500
        # -
        # + x[2] = x[2] * 1.5
    return x, torch.arange(4).repeat(2).expand(3, 8)


def run(n_iter=11):
    torch.manual_seed(2)
    emb = Embedder()
    opt = torch.optim.AdamW(emb.parameters(), 1e-4)
    amp = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(n_iter):
        x, group = tracks(i)
        with torch.autocast("cpu", torch.float16):
            e = emb(x)
            d = squared_distances(e)
            loss = hard_triplet(d, group)
        opt.zero_grad()
        amp.scale(loss).backward()
        amp.step(opt)
        amp.update()
        print(i, "triplet", loss.item())


run()
