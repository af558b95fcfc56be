"""The failing batch is run again, seen, and everything is put back bit for bit."""

from __future__ import annotations

import pickle
import random
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.saved_tensors import graph_trace
from ampcheck.observe.replay import Replay, replay
from ampcheck.trace import GraphTrace


class Net(nn.Module):
    """Fails from the third step on, and keeps all sorts of state."""

    def __init__(self, *, fails: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.fails = fails
        self.calls = 0
        self.losses: list[float] = []
        self.register_buffer("seen", torch.zeros(()))
        self.moving = torch.zeros(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        x = F.relu(self.norm(self.fc(x)))
        self.moving += x.detach().mean(0)
        x = F.dropout(x, 0.5, inplace=self.fails and self.calls > 2, training=self.training)
        loss = self.head(x).square().mean() + random.random() * np.random.rand()
        self.losses.append(float(loss.detach()))
        return loss


class Run:
    """A loop that dies in its third step, with all that a host hands to a replay."""

    def __init__(self, *, fails: bool = True) -> None:
        torch.manual_seed(0)
        self.model = Net(fails=fails)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.scaler = torch.amp.GradScaler("cpu")
        self.batch = torch.linspace(-1, 1, 12).reshape(3, 4)
        self.error: Exception | None = None
        try:
            for _ in range(3):
                loss = self.model(self.batch)
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
        except RuntimeError as error:
            self.error = error

    def state(self) -> dict[str, Any]:
        """Everything, as bytes."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self.model.moving]
        return {
            "tensors": [
                (id(tensor), tensor.requires_grad, pickle.dumps(tensor.detach().numpy())) for tensor in tensors
            ],
            "grads": [(id(p.grad), p.grad is not None and p.grad.numpy().tobytes()) for p in self.model.parameters()],
            "optimizer": pickle.dumps(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "random": bytes(torch.get_rng_state().numpy()),
            "python": random.getstate(),
            "numpy": pickle.dumps(np.random.get_state()),
            "attributes": (self.model.calls, tuple(self.model.losses), self.model.training),
            "hooks": [len(module._forward_hooks) for module in self.model.modules()],
            "modes": torch._C._len_torch_dispatch_stack(),
        }

    def replay(self, step: Any = None) -> Replay[GraphTrace]:
        probe = DispatchProbe(self.model, lambda: None)
        return replay(
            step or (lambda: self.model(self.batch)),
            lambda raised: graph_trace(probe, raised),
            model=self.model,
            error=self.error or RuntimeError("nothing"),
            probes=lambda: probe,
            optimizers=[self.optimizer],
            scaler=self.scaler,
        )


def test_sees_what_the_step_did_and_puts_everything_back() -> None:
    run = Run()
    assert run.error is not None
    before = run.state()

    result = run.replay()

    assert result.went_alike
    assert result.seen is not None
    (stale,) = result.seen.stale
    assert stale.node == "ReluBackward0"
    assert stale.writes[0].site is not None
    assert "inplace=self.fails" in stale.writes[0].site.code
    assert run.state() == before


def test_a_step_that_draws_random_numbers_gets_more_than_one_try() -> None:
    run = Run()
    before = run.state()
    # What the step's own code can reach is put back; a mock is a library's.
    tries = Mock()

    def step() -> torch.Tensor:
        fails = tries.call_count == 2
        tries(fails)
        torch.rand(1)
        x = torch.relu(run.model.head.weight)
        return (x.mul_(2) if fails else x * 2).sum()

    result = run.replay(step)
    assert [call.args[0] for call in tries.call_args_list] == [False, False, True]
    assert result.went_alike
    assert result.seen is not None
    assert len(result.seen.stale) == 1
    assert run.state() == before


def test_a_step_that_draws_nothing_is_run_once() -> None:
    run = Run()
    # What the step's own code can reach is put back; a mock is a library's.
    calls = Mock()

    def step() -> torch.Tensor:
        calls()
        return run.model.head.weight.sum()

    assert not run.replay(step).went_alike
    assert calls.call_count == 1


def test_says_when_nothing_fails_again() -> None:
    run = Run(fails=False)
    before = run.state()

    result = run.replay()

    assert not result.went_alike
    assert result.said == "a replay of the failing batch did not fail"
    assert run.state() == before


def test_optimizer_steps_and_hooks_of_a_replay_are_undone() -> None:
    run = Run()
    before = run.state()

    def step() -> torch.Tensor:
        run.model.register_forward_hook(lambda *_: None)
        run.model.eval().requires_grad_(False)
        run.optimizer.step()
        run.optimizer.param_groups[0]["lr"] = 7.0
        run.model.seen = torch.ones(())
        for parameter in run.model.parameters():
            parameter.grad = None
        raise KeyError("otherwise")

    result = run.replay(step)

    assert result.said == "a replay of the failing batch failed differently: KeyError: 'otherwise'"
    assert run.state() == before


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_no_replay(error: BaseException) -> None:
    run = Run()

    def step() -> None:
        raise AssertionError("replayed")

    result = replay(
        step, lambda raised: raised, model=run.model, error=error, probes=lambda: DispatchProbe(run.model, str)
    )

    assert result.seen is None
    assert result.said.startswith("the failing batch was not replayed")


def test_memory_that_runs_out_in_a_replay() -> None:
    run = Run()

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run.replay(step).said == "a replay of the failing batch ran out of memory"
