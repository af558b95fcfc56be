"""A GAN whose generator loss gains a feature-matching term after a warm-up."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 16)
        self.head = nn.Linear(16, 1)

    def features(self, x):
        return torch.tanh(self.body(x))  # <- save

    def forward(self, x):
        return self.head(self.features(x))


critic = Critic()
opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4)
opt_d = torch.optim.Adam(critic.parameters(), lr=2e-4)
real_data = torch.randn(64, 12)

for step in range(12):
    real = real_data[torch.randint(0, 64, (8,))]
    fake = generator(torch.randn(8, 8))
    d_loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
    opt_d.zero_grad()
    d_loss.backward()
    opt_d.step()

    fake = generator(torch.randn(8, 8))
    g_loss = F.softplus(-critic(fake)).mean()
    if step >= 5:
        matched = critic.features(fake)
        with torch.no_grad():
            target = critic.features(real)
        matched -= target  # <- write
        # -
        # + matched = matched - target
        g_loss = g_loss + matched.square().mean()
    opt_g.zero_grad()
    g_loss.backward()
    opt_g.step()
