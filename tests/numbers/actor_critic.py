"""A2C on a toy corridor; Categorical refuses NaN logits and the script dies with a ValueError."""

import torch
import torch.nn as nn
from torch.distributions import Categorical


class ActorCritic(nn.Module):
    def __init__(self, obs=6, hidden=32, actions=3):
        super().__init__()
        self.shared = nn.Linear(obs, hidden)
        self.actor = nn.Linear(hidden, actions)
        self.critic = nn.Linear(hidden, 1)

    def forward(self, obs):
        h = torch.tanh(self.shared(obs))
        return self.actor(h), self.critic(h).squeeze(-1)


def normalize(returns):
    return (returns - returns.mean()) / returns.std()  # <- origin
    # -
    # + return (returns - returns.mean()) / (returns.std() + 1e-6)


def rollout(step, n=7):
    g = torch.Generator().manual_seed(step)
    obs = torch.randn(n, 6, generator=g)
    rewards = torch.rand(n, generator=g)
    if step == 12:
        rewards.fill_(0.5)  # every episode ended at once
    return obs, rewards


def main():
    torch.manual_seed(77)
    agent = ActorCritic()
    optimizer = torch.optim.RMSprop(agent.parameters(), lr=1e-3)
    for step in range(20):
        obs, rewards = rollout(step)
        logits, value = agent(obs)
        policy = Categorical(logits=logits)
        action = policy.sample()
        advantage = normalize(rewards)
        loss = -(policy.log_prob(action) * advantage).mean() + 0.5 * (value - rewards).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}")


main()
