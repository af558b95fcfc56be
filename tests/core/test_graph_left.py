"""What the graph behind an exception tells, where nothing was watched or replayed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import ampcheck
from ampcheck import Finding


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)) * self.scale)


def batches() -> Iterator[torch.Tensor]:
    # A generator cannot be put back, so that nothing is run again.
    for _ in range(6):
        yield torch.randn(4, 8)


def found(change: str) -> Finding:
    """The finding where ``change`` comes between a forward at the third step and its backward at the fifth."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []
    watch = ampcheck.watch(model, emit=[].append, report=False)

    def train() -> None:
        with watch:
            for index, batch in enumerate(batches()):
                loss = model(batch).square().mean()
                if index == 2:
                    kept.append(model(batch).sum())
                optimizer.zero_grad()
                loss.backward()
                if change == "step" or index < 2:
                    optimizer.step()
                if index == 4:
                    if change == "buffer":
                        model.scale.mul_(2)
                    kept[0].backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train()
    assert watch.report is not None
    (finding,) = [one for one in watch.report.findings if one.severity is ampcheck.Severity.ERROR]
    return finding


@pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"),
    reason="a replay that runs into the same graph leaves its hooks there, and this PyTorch does not show them",
)
def test_a_stale_parameter() -> None:
    finding = found("step")
    assert finding.code == "AMP405"
    assert finding.evidence["parameters"] == ["head.weight"]
    assert finding.edit is None
    assert "was not seen" in finding.message
    assert [site.code for site in finding.sites] == ["kept[0].backward()"]


def test_a_stale_buffer() -> None:
    finding = found("buffer")
    assert finding.code == "AMP407"
    assert finding.evidence["tensor"] == "scale"
