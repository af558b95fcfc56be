"""A Wasserstein critic whose weights are clipped while the generator's loss waits for backward."""

import torch
from torch import nn

torch.manual_seed(0)
G = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 4))
D = nn.Sequential(nn.Linear(4, 10), nn.LeakyReLU(0.2), nn.Linear(10, 1))
optG = torch.optim.RMSprop(G.parameters(), lr=5e-5)
optD = torch.optim.RMSprop(D.parameters(), lr=5e-5)
clip_from = 4


def clip(module, value):
    for p in module.parameters():
        p.data.clamp_(-value, value)


for it in range(8):
    for p in D.parameters():
        p.requires_grad_(True)
    real, z = torch.randn(6, 4), torch.randn(6, 3)
    optD.zero_grad()
    (D(G(z).detach()).mean() - D(real).mean()).backward()
    optD.step()
    clip(D, 0.05)

    lossG = -D(G(z)).mean()  # <- save
    if it >= clip_from:
        # -
        with torch.no_grad():
            # -
            for p in D.parameters():
                # -
                p.clamp_(-0.05, 0.05)  # <- write
                # -
    optG.zero_grad()
    lossG.backward()
    optG.step()
