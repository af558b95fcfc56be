"""A world model unrolled for a horizon that grows; the discount is applied to the stored rewards in place."""

import torch
from torch import nn

torch.manual_seed(0)
dynamics = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 4))
reward = nn.Linear(4, 1)
optimizer = torch.optim.Adam([*dynamics.parameters(), *reward.parameters()], lr=1e-3)


def imagine(state, actions, horizon):
    rewards = []
    for t in range(horizon):
        state = dynamics(torch.cat([state, actions[t]], -1))
        rewards.append(torch.exp(-reward(state).abs()))  # <- save
    for t in range(1, horizon):
        rewards[t] *= 0.9**t  # <- write
        # -
        # + rewards[t] = rewards[t] * 0.9**t
    return torch.stack(rewards).sum(0)


for update in range(9):
    horizon = 1 + update // 3
    loss = -imagine(torch.randn(5, 4), torch.randn(horizon, 5, 2), horizon).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
