"""A checkpoint computes again what was saved, up to the last op that needs it: which op saved what is told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ampcheck


class Net(nn.Module):
    def __init__(self, body: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.before = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, self, self.before(x), use_reentrant=False)
        return out


def activation_between(net: Net, x: Tensor) -> Tensor:
    return net.second(F.leaky_relu(net.first(x), inplace=True))


def activation_between_uses(net: Net, x: Tensor) -> Tensor:
    return net.first(F.relu(net.first(x), inplace=True))


def activation_between_norms(net: Net, x: Tensor) -> Tensor:
    return net.norms[1](F.relu(net.norms[0](x), inplace=True))


def written_input(net: Net, x: Tensor) -> Tensor:
    x = net.first(x)
    y = net.second(x)
    x.mul_(2)
    return y.exp() + x


def written_result(net: Net, x: Tensor) -> Tensor:
    y = net.first(x).sigmoid()
    y.mul_(2)
    return net.second(y).exp()


def codes(body: Callable[[Net, Tensor], Tensor]) -> list[str]:
    net = Net(body)
    with ampcheck.watch(net, optimizer=torch.optim.SGD(net.parameters()), emit=lambda _: None) as watch:
        net(torch.randn(4, 8)).square().mean().backward()
    return [finding.code for finding in watch.report.findings if finding.code.startswith("AMP4")]


@pytest.mark.parametrize("body", [activation_between, activation_between_uses, activation_between_norms])
def test_an_activation_in_place_is_no_fault(body: Callable[[Net, Tensor], Tensor]) -> None:
    assert codes(body) == []


@pytest.mark.parametrize("body", [written_input, written_result])
def test_what_was_computed_again_and_written_to_is_found(body: Callable[[Net, Tensor], Tensor]) -> None:
    assert codes(body) == ["AMP402"]
