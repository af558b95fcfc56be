"""Meta-learning: the inner loop adapts the weights in place, and the support loss joins the outer one later."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
learner = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
outer = torch.optim.Adam(learner.parameters(), lr=1e-3)


def sample_task():
    phase = torch.rand(()) * 3.14
    x = torch.linspace(-3, 3, 10).unsqueeze(1)
    return x, torch.sin(x + phase)


for iteration in range(8):
    before = [p.detach().clone() for p in learner.parameters()]
    x, y = sample_task()
    support = F.mse_loss(learner(x), y)  # <- save
    grads = torch.autograd.grad(support, list(learner.parameters()), retain_graph=iteration >= 4)
    with torch.no_grad():
        for p, g in zip(learner.parameters(), grads):
            p.sub_(0.01 * g)  # <- write
    query = F.mse_loss(learner(x + 0.1), y)
    # + support = F.mse_loss(learner(x), y)
    loss = query + 0.5 * support if iteration >= 4 else query
    outer.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p, b in zip(learner.parameters(), before):
            p.copy_(b)
    outer.step()
