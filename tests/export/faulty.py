"""Models whose export goes wrong, each with its repaired twin where one is needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class NumpyTanh(nn.Module):
    """Leaves the dispatcher."""

    def forward(self, x):
        y = torch.from_numpy(np.tanh(x.detach().numpy()))  # leaves the dispatcher
        return y * 2


class TorchTanh(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * 2


class ListTanh(nn.Module):
    """The same through Python numbers."""

    def forward(self, x):
        return torch.tensor(np.tanh(x.tolist()), dtype=x.dtype) * 2  # leaves the dispatcher


class Gate(nn.Module):
    def forward(self, x):
        if x.mean() > 0:  # decides
            return x
        return -2 * x


class WhereGate(nn.Module):
    def forward(self, x):
        return torch.where(x.mean() > 0, x, -2 * x)


class Scale(nn.Module):
    def forward(self, x):
        return x / float(x.abs().max())  # frozen


class RareGate(nn.Module):
    """A branch that no input anyone draws will take."""

    def forward(self, x):
        if x.abs().max() > 1e6:  # decides
            x = x / 1e6
        return x


class FrozenShape(nn.Module):
    def forward(self, x):
        return x.reshape(int(np.int64(len(x))), -1)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return x * 1


class Net(nn.Module):
    """``body.0`` and ``body.2`` around the module under test, ``body.1``."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), middle, nn.Linear(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


class Between(nn.Module):
    """Leaves the dispatcher between two submodules."""

    def __init__(self):
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.after = nn.Linear(6, 6)

    def forward(self, x):
        x = self.before(x)
        x = torch.from_numpy(np.sin(x.detach().numpy()))  # leaves the dispatcher
        return self.after(x)


class Mean(nn.Module):
    """The mean of many values, in one go or one by one: equal but for rounding."""

    def __init__(self, one_by_one: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(400))
        self.one_by_one = one_by_one

    def forward(self, x):
        x = x * self.weight
        if not self.one_by_one:
            return x.mean(-1)
        total = x[..., 0]
        for index in range(1, 400):
            total = total + x[..., index]
        return total / 400
