"""A custom function that saves its output; a later stage quantises that output in place."""

import torch
from torch import nn


class Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x / (1 + x.abs())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y.abs()).square()


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(8, 4), nn.Linear(4, 8)
        self.bits = None

    def forward(self, x):
        code = Squash.apply(self.enc(x))  # <- save
        if self.bits is not None:
            code.mul_(2**self.bits)  # <- write
            # -
            # + code = code * 2**self.bits
        return self.dec(code)


torch.manual_seed(0)
coder = Coder()
optimizer = torch.optim.SGD(coder.parameters(), lr=0.02)
for epoch in range(4):
    if epoch == 2:
        coder.bits = 3
    for _ in range(4):
        x = torch.randn(5, 8)
        loss = nn.functional.l1_loss(coder(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
