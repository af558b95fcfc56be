"""A diffusion model; small noise levels, which a loop reaches late, threshold the estimate."""

import torch
from torch import nn

torch.manual_seed(0)


class Denoiser(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, 8))

    def forward(self, x, level):
        return self.net(torch.cat([x, level.expand(len(x), 1)], -1))


denoiser = Denoiser()
optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
levels = torch.linspace(1.0, 0.02, 12)
for level in levels:
    clean = torch.rand(6, 8) * 2 - 1
    noisy = clean + level * torch.randn_like(clean)
    estimate = noisy - level * denoiser(noisy, level)
    spread = torch.sqrt(estimate.square().mean(1, keepdim=True) + 1e-3)  # <- save
    if level < 0.3:
        spread.clamp_(min=1.0)  # <- write
        # -
        # + spread = spread.clamp(min=1.0)
    loss = (estimate / spread - clean).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
