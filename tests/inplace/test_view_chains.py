"""Writes to views: autograd hides the node of an in-place op on a view, and makes more nodes after it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ampcheck import AmpChecker, Finding


class Net(nn.Module):
    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.rand(4, 4))
        self.register_buffer("table", torch.rand(4, 4))
        self.body = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def found(forward: Callable[[Net, Tensor], Tensor]) -> tuple[Finding, ...]:
    model = Net(forward)
    checker = AmpChecker(report=False)
    checker.attach(model, emit=lambda _: None)
    try:
        with checker.training_step():
            model(torch.linspace(-1, 1, 16).reshape(4, 4)).backward()
    except RuntimeError as error:
        checker.diagnose(error, phase="training_step")
    checker.detach()
    assert checker.report is not None
    return checker.report.findings


def written_behind_a_clone(model: Net, x: Tensor) -> Tensor:
    y = model.weight * x
    z = y.exp()
    copy = z.clone()
    with torch.no_grad():
        z.add_(1)  # write
    return z.sum() + copy.sum()


def written_after_its_own_write(model: Net, x: Tensor) -> Tensor:
    y = (model.weight @ x)[:2]
    y.sigmoid_()
    y += y  # write
    return y.sum()


def written_through_a_view_of_another_shape(model: Net, x: Tensor) -> Tensor:
    y = model.weight + x
    loss = F.mse_loss(y, x, reduction="none")
    part = loss[:, 1:3]
    part.mul_(part)
    part.addcmul_(part, part)  # write
    y[:1] = loss[:1]
    y.neg_()
    return loss.sum() + y.sum()


def leaf_made_part_of_a_graph(model: Net, x: Tensor) -> Tensor:
    y = torch.mm(model.weight, model.table)
    model.table.reshape(4, 4).add_(model.weight)  # write
    return y.sum() + model.table.square().sum()


@pytest.mark.parametrize(
    ("forward", "code"),
    [
        (written_behind_a_clone, "AMP401"),
        (written_after_its_own_write, "AMP401"),
        (written_through_a_view_of_another_shape, "AMP401"),
        (leaf_made_part_of_a_graph, "AMP407"),
    ],
)
def test_the_line_that_wrote_is_named(forward: Callable[[Net, Tensor], Tensor], code: str) -> None:
    finding = found(forward)[0]
    assert finding.code == code
    assert "# write" in [site for site in finding.sites if site.role == "write"][-1].code


def test_each_of_three_lines_is_named() -> None:
    def forward(model: Net, x: Tensor) -> Tensor:
        y = model.weight.exp()
        y[:1] += 1
        y.mul_(2)
        y[0] = 0
        return y.sum()

    (finding,) = found(forward)
    assert len({site.line for site in finding.sites if site.role == "write"}) == 3


def unchanged_through_data(model: Net, x: Tensor) -> Tensor:
    first, _ = torch.stack([model.weight, model.weight]).unbind()
    y = F.gelu(first)
    y[:1] = x[:1]
    first.data.mul_(1)
    return y.sum()


def shared_with_numpy_and_edited_before_the_save(model: Net, x: Tensor) -> Tensor:
    y = F.linear(model.weight, model.weight)
    y.detach().numpy()[0] = 2.0
    F.linear(y, y)
    y.data.mul_(2)
    return torch.mm(model.weight, y).sum()


@pytest.mark.parametrize("forward", [unchanged_through_data, shared_with_numpy_and_edited_before_the_save])
def test_right_gradients_have_no_finding(forward: Callable[[Net, Tensor], Tensor]) -> None:
    assert found(forward) == ()
