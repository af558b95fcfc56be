"""Policy optimization: several passes over the same rollout, the ratio limited in place from the second on."""

import torch
from torch import nn


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
        self.value = nn.Linear(4, 1)

    def log_prob(self, states, actions):
        return torch.distributions.Categorical(logits=self.policy(states)).log_prob(actions)


def update(agent, optimizer, rollout, passes):
    states, actions, returns = rollout
    with torch.no_grad():
        old = agent.log_prob(states, actions)
        advantage = returns - agent.value(states).squeeze(-1)
    for i in range(passes):
        ratio = (agent.log_prob(states, actions) - old).exp()  # <- save
        if i > 0:
            ratio.clamp_(0.8, 1.2)  # <- write
            # -
            # + ratio = ratio.clamp(0.8, 1.2)
        loss = -(ratio * advantage).mean() + (returns - agent.value(states).squeeze(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()


torch.manual_seed(0)
agent = Agent()
optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4)
for iteration in range(3):
    rollout = torch.randn(12, 4), torch.randint(0, 2, (12,)), torch.randn(12)
    update(agent, optimizer, rollout, passes=1 + iteration)
