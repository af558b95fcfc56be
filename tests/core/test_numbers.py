"""Programs whose numbers fail at a later step: the op, its line and why, and in which precision they would not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ampcheck

FROM = 3
TRUE: dict[str, dict[str, Any]] = {}
FAILING: dict[str, Callable[[], None]] = {}
HEALTHY: dict[str, Callable[[], None]] = {}


def failing(
    code: str, op: str | None = None, kind: str | None = None, *, float32: bool | None = True, **more: Any
) -> Any:
    def take(function: Callable[[], None]) -> Callable[[], None]:
        FAILING[function.__name__] = function
        TRUE[function.__name__] = {"code": code, "op": op, "kind": kind, "float32": float32} | more
        return function

    return take


def healthy(function: Callable[[], None]) -> Callable[[], None]:
    HEALTHY[function.__name__] = function
    return function


def rows(width: int = 8, steps: int = 7) -> Iterator[tuple[int, Tensor]]:
    torch.manual_seed(0)
    for step in range(steps):
        yield step, torch.randn(4, width)


def net(width: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


def half() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.float16)


@failing("AMP502", "aten::bmm", "overflow", true_value=True)
def scores_of_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(8, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.qk(x).view(4, 1, 2, 16).unbind(2)
            scores = q.transpose(1, 2) @ k  # <- origin
            return scores.softmax(-1)

    model = Attention()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step, x in rows():
        with half():
            loss = model(x * (2000 if step >= FROM else 1)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@failing("AMP502", "aten::sum", "overflow", true_value=True)
def a_sum_over_pixels() -> None:
    model = net(512)
    optimizer = sgd(model)
    for step, x in rows(512):
        with half():
            p = model(x).sigmoid()
            if step >= FROM:
                p = p + 100
            area = p.sum()  # <- origin
            loss = (p * p).mean() / area + area * 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP503", "aten::div", "constant-lost")
def an_eps_that_float16_rounds_to_zero() -> None:
    def normalized(z: Tensor) -> Tensor:
        return z / (z.norm(dim=-1, keepdim=True) + 1e-8)  # <- origin

    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        with half():
            z = model(x)
            if step >= FROM:
                z = z * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None].half()
            loss = (normalized(z) @ normalized(z).T).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP504", "aten::sqrt", "singular", float32=False, phase="backward", root="gradient")
def the_gradient_of_a_root_at_zero() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1).sqrt()  # <- origin

    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        if step >= FROM:
            x[1] = x[0]
        z = model(x)
        loss = distance(z[0], z[1]) + distance(z[2], z[3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP505", "aten::_softmax", "masked", float32=False)
def a_row_in_which_all_is_masked() -> None:
    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        mask = torch.ones(4, 8).triu(5).bool()
        mask[2] |= step >= FROM
        z = model(x).masked_fill(mask, float("-inf"))  # <- write
        loss = z.softmax(-1)[:, 0].mean()  # <- origin
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP510", None, "given", float32=False, samples=[2], name="batch['x']")
def a_sample_of_the_batch() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for step, x in rows():
            x[2, 1] = float("nan") if step >= FROM else 0.0
            yield {"x": x, "y": torch.zeros(4, 8)}

    model = net()
    optimizer = sgd(model)
    for batch in batches():
        loss = F.mse_loss(model(batch["x"]), batch["y"])  # <- origin
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP504", "aten::exp", "overflow", float32=False)
def an_exponential_beyond_float32() -> None:
    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        ratio = (model(x) + (200 if step >= FROM else 0)).exp()  # <- origin
        loss = ratio.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP502", "aten::addmm", "overflow", phase="backward")
def in_a_checkpointed_block() -> None:
    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        with half():
            z = checkpoint(model, x * (25e3 if step >= FROM else 1), use_reentrant=False)  # <- origin
            loss = z.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP504", "aten::div", "singular", float32=False, phase="backward")
def in_the_backward_of_a_custom_function() -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, scale: Tensor) -> Tensor:
            ctx.save_for_backward(scale)
            return z * 1

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            (scale,) = ctx.saved_tensors
            return gradient / scale, None  # <- origin

    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        scale = torch.ones(4, 8) * (step < FROM)
        loss = Scaled.apply(model(x), scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP502", "aten::mul", "overflow", float32=True)
def written_in_place() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls = net(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            z = self.body(x) * 1
            z.mul_(60000 if self.calls > FROM else 1)
            return z * 60000 if self.calls > FROM else z  # <- origin

    model = Late()
    optimizer = sgd(model)
    for _, x in rows():
        with half():
            loss = F.smooth_l1_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP502", "aten::mm", "overflow", model="half", true_value=True)
def a_model_in_float16() -> None:
    model = nn.Linear(8, 8, bias=False).half()
    optimizer = sgd(model)
    for step, x in rows():
        z = model((x * (3e3 if step >= FROM else 1)).half())
        z = z @ (torch.eye(8).half() * 100)  # <- origin
        loss = z.float().abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@failing("AMP504", "aten::log", "singular", float32=False)
def under_gradient_accumulation() -> None:
    model = net()
    optimizer = sgd(model)
    for step, x in rows():
        probability = model(x).sigmoid() * (step < FROM)
        loss = -probability.log().mean() / 2  # <- origin
        loss.backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


@healthy
def masks_that_are_infinite() -> None:
    model = net()
    optimizer = sgd(model)
    for _, x in rows():
        mask = torch.full((8, 8), float("-inf")).triu(1)
        z = model(x)
        loss = (z[:, :, None] * z[:, None] + mask).softmax(-1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def a_scaler_that_searches_its_scale() -> None:
    model = net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for _, x in rows(steps=14):
        with half():
            loss = F.mse_loss(model(x), x)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@healthy
def memory_that_was_not_initialised() -> None:
    model = net()
    optimizer = sgd(model)
    for _, x in rows():
        out = torch.empty(4, 8).fill_(math.nan)
        out.copy_(model(x))
        loss = out.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def padding_that_is_cleaned() -> None:
    model = net()
    optimizer = sgd(model)
    for _, x in rows():
        x[0, 3:] = math.nan
        loss = model(torch.where(x.isnan(), torch.zeros(()), x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@healthy
def a_buffer_of_infinities() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.register_buffer("mask", torch.full((8,), -math.inf).scatter(0, torch.tensor([0, 1]), 0.0))

        def forward(self, x: Tensor) -> Tensor:
            return (self.body(x) + self.mask).softmax(-1)

    model = Masked()
    optimizer = sgd(model)
    for _, x in rows():
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def marked(function: Callable[[], None], mark: str) -> int | None:
    lines, first = inspect.getsourcelines(function)
    return next((first + i for i, line in enumerate(lines) if line.rstrip().endswith(f"# <- {mark}")), None)


def run(program: Callable[[], None], numerics: str, **options: Any) -> Any:
    with ampcheck.watch(None, report=False, numerics=numerics, emit=lambda text: None, **options) as watch:
        program()
    assert watch.report is not None
    assert watch.report.trace.internal_error is None, watch.report.trace.internal_error
    return watch.report


@pytest.mark.parametrize("name", FAILING)
def test_what_failed_is_named(name: str) -> None:
    program, true = FAILING[name], TRUE[name]
    finding = next(one for one in run(program, "guard").findings if one.code.startswith("AMP5"))
    assert finding.code == true["code"], finding.message
    evidence = finding.evidence
    assert evidence["kind"] == true["kind"]
    assert true["op"] is None or evidence["op"] == true["op"]
    (line,) = [site.line for site in finding.sites if site.role == "origin"]
    assert line == marked(program, "origin")
    assert [site.line for site in finding.sites if site.role == "write"] == [
        line for line in [marked(program, "write")] if line
    ]
    assert evidence["finite_in"]["float32"] is true["float32"]
    assert evidence["phase"] == true.get("phase", "forward")
    assert evidence["root"] == true.get("root", evidence["root"])
    assert evidence["samples"] == true.get("samples", evidence["samples"])
    assert evidence.get("given", {}).get("name") == true.get("name")
    if true.get("true_value"):
        assert abs(evidence["true_value"]) > evidence["limit"]
    if name != "under_gradient_accumulation":
        assert evidence["step"] == FROM


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("numerics", ["free", "guard", "stop"])
def test_a_healthy_run_is_left_alone(name: str, numerics: str) -> None:
    # There is no scaler on purpose, and one that searches its scale skips its first steps.
    assert not [one for one in run(HEALTHY[name], numerics).findings if one.code not in ("AMP301", "AMP310", "AMP512")]


class TestStop:
    def test_it_stops_before_the_weights_are_lost(self) -> None:
        model = net()
        optimizer = sgd(model)

        def program() -> None:
            for step, x in rows():
                optimizer.zero_grad()
                model(x / (step < FROM)).square().mean().backward()
                optimizer.step()

        with pytest.raises(FloatingPointError, match="the loss of step 3 is not finite") as stopped:
            run(program, "stop")
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        assert "AMP5" in "".join(stopped.value.__notes__)

    def test_not_where_only_the_scale_is_too_large(self) -> None:
        run(HEALTHY["a_scaler_that_searches_its_scale"], "stop")


class TestFree:
    def test_statistics_that_a_skipped_step_broke(self) -> None:
        def program() -> None:
            model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
            optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
            for step, x in rows():
                with half():
                    loss = model(x * (1e6 if step == FROM else 1)).float().square().mean()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        finding = next(one for one in run(program, "free").findings if one.code == "AMP511")
        assert finding.evidence["buffers"] == ["1.running_mean", "1.running_var"]
        assert "reset_running_stats()" in finding.fix

    def test_weights_that_are_lost(self) -> None:
        report = run(FAILING["an_exponential_beyond_float32"], "free")
        finding = next(one for one in report.findings if one.code == "AMP511")
        assert finding.evidence["parameters"]

    def test_nothing_is_looked_at_when_off(self) -> None:
        assert not run(FAILING["an_exponential_beyond_float32"], "off").findings

    def test_a_wrong_word(self) -> None:
        with pytest.raises(ValueError, match="numerics must be"):
            ampcheck.watch(None, numerics="loud")


class TestWeightsInLowPrecision:
    @staticmethod
    def trained(lr: float, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
        def program() -> None:
            model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)).bfloat16()
            trains = optimizer(model.parameters(), lr=lr)
            for _, x in rows(64, 3):
                trains.zero_grad()
                model(x.bfloat16()).float().square().mean().backward()
                trains.step()

        return {one.code: one for one in run(program, "free").findings}

    def test_updates_that_are_lost(self) -> None:
        finding = self.trained(1e-5)["AMP508"]
        assert "1.weight" in finding.evidence["parameters"]
        assert finding.evidence["parameters"]["1.weight"][0] == finding.evidence["parameters"]["1.weight"][1]

    def test_updates_that_are_large_enough(self) -> None:
        assert "AMP508" not in self.trained(0.05)


def test_a_program_that_leaves() -> None:
    def program() -> None:
        model = net()
        for step, x in rows():
            loss = (model(x) * (step < FROM)).abs().log().mean()  # <- origin
            if not math.isfinite(loss.item()):
                raise SystemExit(1)
            loss.backward()

    said: list[str] = []
    with pytest.raises(SystemExit), ampcheck.watch(None, report=False, numerics="guard", emit=said.append):
        program()
    assert "AMP504" in "".join(said)


def test_a_check_of_the_programs_own() -> None:
    def program() -> None:
        model = net()
        for step, x in rows():
            loss = (model(x) * (step < FROM)).log().sum().abs().log()  # <- origin
            assert torch.isfinite(loss) or step < FROM, "the loss is not finite"
            if step < FROM:
                model(x).sum().backward()

    with pytest.raises(AssertionError) as raised:
        run(program, "guard")
    assert "AMP504" in "".join(raised.value.__notes__)
