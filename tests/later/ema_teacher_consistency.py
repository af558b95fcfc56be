"""A mean teacher whose weights are averaged between its forward pass and backward, once the ramp-up is over."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
student = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
teacher = copy.deepcopy(student)
optimizer = torch.optim.SGD(student.parameters(), lr=0.05)


def update_teacher(decay):
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters()):
            slow.mul_(decay).add_(fast, alpha=1 - decay)  # <- write


for step in range(20):
    x, y = torch.randn(8, 10), torch.randint(0, 4, (8,))
    logits = student(x)
    loss = F.cross_entropy(logits, y)
    if step >= 6:
        loss = loss + F.mse_loss(logits, teacher(x + 0.1 * torch.randn_like(x)))  # <- save
        update_teacher(0.99)
        # -
    optimizer.zero_grad()
    loss.backward()
    # + update_teacher(0.99)
    optimizer.step()
