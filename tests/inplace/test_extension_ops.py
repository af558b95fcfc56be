"""Ops of extensions: their kernels may be PyTorch programs, which autograd and autocast reach as if nobody watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ampcheck import AmpChecker


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with torch.library._scoped_library("ampcheck_test", "FRAGMENT") as ops:
        ops.define("project(Tensor x, Tensor weight) -> Tensor")
        ops.impl("project", lambda x, weight: torch.mm(x, weight).sin(), "CPU")
        ops.define("scale_(Tensor(a!) x, Tensor by) -> ()")
        ops.impl("scale_", scale_, "CPU")
        yield


def scale_(x: Tensor, by: Tensor) -> None:
    x.mul_(by)


class Net(nn.Module):
    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.ampcheck_test.project(self.linear(x), self.linear.weight)
        y = x.exp() if self.wrong else x + 1
        torch.ops.ampcheck_test.scale_(y, x.detach())
        return y.float().cumprod(0).sum()


def step(model: Net) -> None:
    x = torch.linspace(-1, 1, 16).reshape(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x)
    loss.backward()


def test_gradients_pass_through_kernels_as_without() -> None:
    plain, watched = Net(), Net()
    step(plain)
    checker = AmpChecker(report=False)
    checker.attach(watched, emit=lambda _: None)
    with checker.training_step():
        step(watched)
    checker.detach()
    assert checker.report is not None
    assert checker.report.findings == ()
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert one.grad is not None
        assert one.grad.count_nonzero()
        assert torch.equal(one.grad, other.grad)


def test_the_write_of_an_extension_op_is_named() -> None:
    model = Net(wrong=True)
    checker = AmpChecker(report=False)
    checker.attach(model, emit=lambda _: None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as raised, checker.training_step():
        step(model)
    checker.diagnose(raised.value, phase="training_step")
    checker.detach()
    assert checker.report is not None
    (finding,) = checker.report.findings
    roles = {site.role: site for site in finding.sites}
    assert finding.code == "AMP401"
    assert roles["write"].op == "ampcheck_test::scale_"
    assert "scale_(y" in roles["write"].code
    assert "x.exp()" in roles["save"].code
