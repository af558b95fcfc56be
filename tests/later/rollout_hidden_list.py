"""Advantage actor-critic: values collected over a rollout, the terminal ones cleared before the loss."""

import torch
from torch import nn

torch.manual_seed(0)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 16)
        self.pi, self.v = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, observation):
        h = torch.relu(self.shared(observation))
        return torch.distributions.Categorical(logits=self.pi(h)), torch.tanh(self.v(h)).squeeze(-1)  # <- save


def rollout(policy, length):
    log_probs, values, rewards = [], [], []
    for _ in range(length):
        distribution, value = policy(torch.randn(3, 4))
        action = distribution.sample()
        log_probs.append(distribution.log_prob(action))
        values.append(value)
        rewards.append(torch.rand(3))
    return log_probs, values, rewards


policy = Policy()
optimizer = torch.optim.RMSprop(policy.parameters(), lr=7e-4)
for update in range(7):
    log_probs, values, rewards = rollout(policy, 4)
    if update >= 4:
        values[-1].zero_()  # <- write
        # -
        # + values[-1] = torch.zeros_like(values[-1])
    advantages = [r - v for r, v in zip(rewards, values)]
    actor = -sum((lp * a.detach()).mean() for lp, a in zip(log_probs, advantages))
    critic = sum(a.square().mean() for a in advantages)
    optimizer.zero_grad()
    (actor + 0.5 * critic).backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
    optimizer.step()
