"""WGAN with a gradient penalty."""

import torch
import torch.nn as nn


def mlp(i, o):
    return nn.Sequential(nn.Linear(i, 32), nn.ReLU(), nn.Linear(32, o))


class WGAN:
    def __init__(self):
        torch.manual_seed(88)
        self.G, self.D = mlp(4, 2), mlp(2, 1)
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=1e-4, betas=(0.5, 0.9))
        self.opt_d = torch.optim.Adam(self.D.parameters(), lr=1e-4, betas=(0.5, 0.9))

    def penalty(self, real, fake):
        eps = torch.rand(real.size(0), 1)
        mixed = (eps * real + (1 - eps) * fake).requires_grad_(True)
        (grad,) = torch.autograd.grad(self.D(mixed).sum(), mixed, create_graph=True)
        norm = (grad**2).sum(1).sqrt()  # <- origin
        # -
        # + norm = (grad ** 2).sum(1).add(1e-12).sqrt()
        return ((norm - 1) ** 2).mean()

    def critic_step(self, real):
        fake = self.G(torch.randn(real.size(0), 4)).detach()
        loss = self.D(fake).mean() - self.D(real).mean() + 10 * self.penalty(real, fake)
        self.opt_d.zero_grad()
        loss.backward()
        self.opt_d.step()
        return loss.item()

    def generator_step(self, n):
        loss = -self.D(self.G(torch.randn(n, 4))).mean()
        self.opt_g.zero_grad()
        loss.backward()
        self.opt_g.step()
        return loss.item()


gan = WGAN()
for it in range(10):
    real = torch.randn(16, 2) + torch.tensor([2.0, 0.0])
    if it == 6:
        with torch.no_grad():  # pruning cuts one half-plane of the critic
            gan.D[0].bias[:] = -50.0
    d = gan.critic_step(real)
    g = gan.generator_step(16)
    print(f"{it} critic {d:.4f} generator {g:.4f}")
