"""A GAN that, from some step on, reuses the critic's score of the fakes after the critic's update."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
opt_g = torch.optim.SGD(generator.parameters(), lr=0.01)
opt_d = torch.optim.SGD(critic.parameters(), lr=0.01)

for step in range(10):
    real = torch.randn(8, 6)
    fake = generator(torch.randn(8, 4))
    score_fake = critic(fake)  # <- save
    loss_d = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()
    opt_d.zero_grad()
    loss_d.backward()
    opt_d.step()  # <- write
    if step < 3:
        score_fake = critic(fake)
    # + score_fake = critic(fake)
    loss_g = -score_fake.mean()
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
