"""Q-learning whose target network is updated softly between forward and backward, once the buffer is warm."""

import copy
import random
from collections import deque

import torch
from torch import nn

random.seed(0)
torch.manual_seed(0)
online = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
target = copy.deepcopy(online)
optimizer = torch.optim.Adam(online.parameters(), lr=1e-3)
buffer = deque(maxlen=100)
learned = 0
for frame in range(24):
    buffer.append((torch.randn(4), random.randrange(2), random.random(), torch.randn(4)))
    if len(buffer) < 8:
        continue
    states, actions, rewards, following = zip(*random.sample(buffer, 8))
    q = online(torch.stack(states)).gather(1, torch.tensor(actions)[:, None]).squeeze(1)
    future = target(torch.stack(following)).max(1).values  # <- save
    if learned > 5:
        # -
        with torch.no_grad():
            # -
            for slow, fast in zip(target.parameters(), online.parameters()):
                # -
                slow.lerp_(fast, 0.01)  # <- write
                # -
    loss = (q - (torch.tensor(rewards) + 0.9 * future)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    # + with torch.no_grad():
    # +     for slow, fast in zip(target.parameters(), online.parameters()):
    # +         slow.lerp_(fast, 0.01)
    learned += 1
