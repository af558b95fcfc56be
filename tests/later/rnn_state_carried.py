"""A recurrent network whose state is carried on without being detached, after the first chunk of each sequence."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
cell = nn.GRUCell(6, 12)
head = nn.Linear(12, 6)
optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=1e-3)
sequence = torch.randn(24, 4, 6)
state = torch.zeros(4, 12)

for t in range(sequence.size(0) - 1):
    if t < 3:
        state = state.detach()
    # + state = state.detach()
    state = cell(sequence[t], state)  # <- save
    loss = F.mse_loss(head(state), sequence[t + 1])
    optimizer.zero_grad()
    loss.backward(retain_graph=True)
    optimizer.step()  # <- write
