"""A loop over a wrapper that reports progress, with an exit on a bad loss and a penalty that sets in late."""

import sys
import time

import torch
from torch import nn


class Progress:
    def __init__(self, iterable, stream=sys.stderr):
        self.iterable, self.stream, self.started = iterable, stream, time.time()
        self.postfix = {}

    def __iter__(self):
        for number, item in enumerate(self.iterable):
            yield item
            self.stream.write(f"{number} {time.time() - self.started:.1f} {self.postfix}\r")

    def set_postfix(self, **values):
        self.postfix = values


torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 2))
optimizer = torch.optim.NAdam(net.parameters())
bar = Progress(range(12))
for step in bar:
    optimizer.zero_grad(set_to_none=True)
    x = torch.randn(8, 3)
    mean, log_var = net(x).chunk(2, dim=1)
    variance = log_var.exp()  # <- save
    if step > 7:
        variance.clamp_(min=0.5)  # <- write
        # -
        # + variance = variance.clamp(min=0.5)
    loss = ((x.sum(1, keepdim=True) - mean).square() / variance + variance.log()).mean()
    if not torch.isfinite(loss):
        sys.exit("diverged")
    loss.backward()
    nn.utils.clip_grad_value_(net.parameters(), 1.0)
    optimizer.step()
    bar.set_postfix(loss=loss.item())
