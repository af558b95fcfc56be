"""Actor and critic: with a delayed policy, the actor's loss is computed before the critic's update."""

import torch
from torch import nn

torch.manual_seed(0)
actor = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2), nn.Tanh())
critic = nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 1))
actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)


def value(states, actions):
    return critic(torch.cat([states, actions], -1))  # <- save


for update in range(12):
    states, actions, returns = torch.randn(8, 5), torch.randn(8, 2), torch.randn(8, 1)
    actor_loss = None
    if update % 4 == 3:
        # -
        actor_loss = -value(states, actor(states)).mean()
        # -
    critic_loss = (value(states, actions) - returns).square().mean()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()  # <- write
    # + if update % 4 == 3:
    # +     actor_loss = -value(states, actor(states)).mean()
    if actor_loss is not None:
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
