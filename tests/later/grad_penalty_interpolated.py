"""A gradient penalty with create_graph, lazily every few steps; its norm is shifted in place."""

import torch
from torch import nn

torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 1))
optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))


def penalty(real, fake):
    mix = torch.rand(real.size(0), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    norm = gradient.square().sum(1).add(1e-12).sqrt()  # <- save
    norm -= 1  # <- write
    # -
    # + norm = norm - 1
    return norm.square().mean()


for iteration in range(1, 13):
    real, fake = torch.randn(6, 4), torch.randn(6, 4) + 1
    loss = critic(fake).mean() - critic(real).mean()
    if iteration % 5 == 0:
        loss = loss + 10 * penalty(real, fake)
    critic.zero_grad()
    loss.backward()
    optimizer.step()
