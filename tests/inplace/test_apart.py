"""Ops that a dispatch mode changes run apart from the probe: in forward, in what backward recomputes, and beside the
modes of others. Gradients are to the bit those of a run that nobody watches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from ampcheck import AmpChecker, Finding

Forward = Callable[["Net", Tensor], Tensor]


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with torch.library._scoped_library("ampcheck_apart", "FRAGMENT") as ops:
        ops.define("project(Tensor x, Tensor weight) -> Tensor")
        ops.impl("project", lambda x, weight: torch.mm(x, weight).sin(), "CPU")
        ops.define("touch_(Tensor(a!) x) -> ()")
        ops.impl("touch_", lambda x: (x.mul_(1), None)[1], "CPU")
        ops.define("overwrite_(Tensor(a!) x) -> ()")
        ops.impl("overwrite_", lambda x: (x.data.mul_(3), None)[1], "CPU")
        yield


class Net(nn.Module):
    def __init__(self, body: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Products(torch.autograd.Function):
    """Its backward differentiates products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = (x.prod(0) * x.cumprod(0)).sum()
        return gradient * torch.autograd.grad(y, x)[0]


def extension_in_checkpoint(model: Net, x: Tensor, *, reentrant: bool) -> Tensor:
    project = torch.ops.ampcheck_apart.project
    return checkpoint(lambda h: project(h, model.linear.weight), model.linear(x), use_reentrant=reentrant).sum()


def products_in_checkpoint(model: Net, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(lambda h: h.prod(0) * h.cumprod(0), model.linear(x), use_reentrant=reentrant).sum()


def products_in_backward(model: Net, x: Tensor) -> Tensor:
    return Products.apply(model.linear(x)).sum()


def bilinear(model: Net, x: Tensor) -> Tensor:
    return model.bilinear(model.linear(x).float(), x).sum()


def norm_beside_a_cache(model: Net, x: Tensor) -> Tensor:
    kept = [torch.ops.aten.mm.default, torch.ops.aten.sum.default]
    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, kept)
    return checkpoint(lambda h: h.norm() * (h * h).sum(), model.linear(x), use_reentrant=False, context_fn=contexts)


def step(model: Net, *, within: bool) -> None:
    x = torch.linspace(-1, 1, 16).reshape(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x)
        if within:
            loss.backward()
    if not within:
        loss.backward()


def watched(model: Net, run: Callable[[], None]) -> tuple[Finding, ...]:
    checker = AmpChecker(report=False)
    checker.attach(model, emit=lambda _: None)
    with checker.training_step():
        run()
    checker.detach()
    assert checker.report is not None
    assert torch._C._len_torch_dispatch_stack() == torch._C._len_torch_function_stack() == 0
    return checker.report.findings


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        functools.partial(extension_in_checkpoint, reentrant=False),
        functools.partial(extension_in_checkpoint, reentrant=True),
        functools.partial(products_in_checkpoint, reentrant=False),
        functools.partial(products_in_checkpoint, reentrant=True),
        products_in_backward,
        bilinear,
        norm_beside_a_cache,
    ],
)
def test_gradients_are_those_of_an_unwatched_step(body: Forward, within: bool) -> None:
    if body is norm_beside_a_cache and not hasattr(checkpointing, "create_selective_checkpoint_contexts"):
        pytest.skip("this PyTorch has no selective checkpointing")
    plain, seen = Net(body), Net(body)
    step(plain, within=within)
    engine = torch.autograd._engine_run_backward
    findings = watched(seen, lambda: step(seen, within=within))
    assert torch.autograd._engine_run_backward is engine
    assert [finding.code for finding in findings if finding.code != "AMP106"] == []
    for one, other in zip(plain.parameters(), seen.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def written_by(op: str) -> Forward:
    def forward(model: Net, x: Tensor) -> Tensor:
        scale = torch.ones(4, 4)
        y = model.linear(x) * scale
        getattr(torch.ops.ampcheck_apart, op)(scale.data if op == "touch_" else scale)
        return y.sum()

    return forward


def products_of_what_is_overwritten(model: Net, x: Tensor) -> Tensor:
    y = model.linear(x)
    product = y.prod(0)
    y.data.mul_(3)
    return product.sum()


@pytest.mark.parametrize(
    ("body", "codes"),
    [(written_by("touch_"), []), (written_by("overwrite_"), ["AMP402"]), (products_of_what_is_overwritten, ["AMP402"])],
)
def test_what_is_written_is_seen(body: Forward, codes: list[str]) -> None:
    model = Net(body)
    findings = watched(model, lambda: model(torch.linspace(-1, 1, 16).reshape(4, 4)).backward())
    assert [finding.code for finding in findings] == codes


def test_compiled_in_the_watched_step() -> None:
    def run() -> None:
        half = torch.compile(lambda h: h.norm() * 2, backend="eager", fullgraph=True)
        (model.linear(torch.ones(4, 4)).sum() * half(torch.ones(4))).backward()

    model = Net(bilinear)
    assert watched(model, run) == ()
