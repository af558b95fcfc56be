"""Programs that look like the failures and are none: no finding of the crash and scaler rules, and no error at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases.scaler_crashes import Net, loss_of
from cases.training import BF16, rows, sgd, train
from torch import nn

from ampcheck.rules.rule import Severity

if TYPE_CHECKING:
    from conftest import Recorder

Program = Callable[["Recorder"], None]
CRASH_CODES = {
    "AMP203",
    "AMP205",
    "AMP206",
    "AMP207",
    "AMP209",
    "AMP212",
    "AMP303",
    "AMP304",
    "AMP305",
    "AMP306",
    "AMP307",
    "AMP308",
    "AMP310",
    "AMP311",
    "AMP312",
}


def float32_island(guard: Recorder) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            with torch.autocast("cpu", enabled=False):
                return self.head(x.float())

    model = Island()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


def cast_custom_function(guard: Recorder) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    class Doubled(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Double.apply(super().forward(x))

    model = Doubled()
    with guard(model):
        train(model, lambda: loss_of(model))


def true_bfloat16(guard: Recorder) -> None:
    model = Net().bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


def disabled_scaler(guard: Recorder) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def accumulation(guard: Recorder) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        for _ in range(2):
            (scaler.scale(loss_of(model)) / 2).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def sum_of_scaled_losses(guard: Recorder) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        torch.autograd.backward(scaler.scale(loss_of(model)) + scaler.scale(loss_of(model)))
        scaler.step(optimizer)
        scaler.update()


def two_optimizers_one_scaled(guard: Recorder) -> None:
    model = Net()
    body, head = sgd(model.body.parameters()), sgd(model.head.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with guard(model, optimizers=(body, head), scaler=scaler):
        scaler.scale(loss_of(model.body)).backward()
        scaler.step(body)
        loss_of(model.head).backward()
        torch.nn.utils.clip_grad_value_(model.head.parameters(), 1.0)
        head.step()
        scaler.update()


def unscaled_by_hand(guard: Recorder) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scale = scaler.get_scale()
        for parameter in model.parameters():
            parameter.grad /= scale
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for parameter in model.parameters():
            parameter.grad *= scale
        scaler.step(optimizer)
        scaler.update()


def clipped_to_a_scaled_norm(guard: Recorder) -> None:
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0 * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()


def watched_from_inside_the_scaling(guard: Recorder) -> None:
    """`scaler.scale` is looked up before `model(x)`, in whose call a plain loop's watch begins."""
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    scale = scaler.scale
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()


def checkpointed(guard: Recorder) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=True))

    model = Checkpointed()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    with guard(model, optimizers=(optimizer,), scaler=scaler):
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()


HEALTHY: list[Program] = [
    float32_island,
    cast_custom_function,
    true_bfloat16,
    disabled_scaler,
    accumulation,
    sum_of_scaled_losses,
    two_optimizers_one_scaled,
    unscaled_by_hand,
    clipped_to_a_scaled_norm,
    watched_from_inside_the_scaling,
    checkpointed,
]


@pytest.mark.parametrize("program", HEALTHY, ids=lambda program: program.__name__)
def test_a_healthy_program_has_no_error(program: Program, recorder: Recorder) -> None:
    program(recorder)

    assert recorder.error is None
    assert [finding for finding in recorder.findings if finding.severity is Severity.ERROR] == []
    assert CRASH_CODES.isdisjoint(finding.code for finding in recorder.findings)


def test_an_exception_of_the_users_own_gets_no_finding(recorder: Recorder) -> None:
    model = Net()
    with recorder(model):
        raise ValueError("no such file")

    assert recorder.failure.facts is None
    assert CRASH_CODES.isdisjoint(finding.code for finding in recorder.findings)
    assert not hasattr(recorder.error, "__notes__")
