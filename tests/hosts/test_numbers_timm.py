"""Numbers that fail in timm's train script, on real digits."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from digits import digits, upscaled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("timm.task", reason="this timm's train script is an older one")

import timm_train
from failing_layers import LAYERS, STEP, Angle, DigitNet, Late, Scores, Statistics, assert_true
from hosts.test_replay_timm import REGIONS
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from ampcheck import AmpChecker, Finding
from ampcheck.integrations.timm import FIXES, install


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class Script:
    """What timm's train script does with a layer; ``weights`` are those before each step."""

    def __init__(self, layer: nn.Module, numerics: str, precision: str) -> None:
        self.model = DigitNet(layer)
        self.task = ClassificationTask(self.model, nn.CrossEntropyLoss(), verbose=False)
        self.optimizer = create_optimizer_v2(self.model, opt="adamw", lr=1e-3)
        self.scaler = NativeScaler(device="cpu") if precision == "float16" else None
        if self.scaler is not None:
            self.scaler._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        self.region = REGIONS[precision]
        images, labels = digits("train", 48)
        self.loader = DataLoader(TensorDataset(upscaled(images, 32), labels), batch_size=4)
        self.checker = AmpChecker(ignore="AMP107,AMP310", numerics=numerics)
        self.losses: list[Any] = []

    def run(self, epochs: int = 2, first: int = 0, accumulate: int = 1) -> None:
        fork = ModuleType("fork")
        vars(fork).update(vars(timm_train))
        fork.print = self.losses.append
        install(fork, checker=self.checker)
        args = argparse.Namespace(grad_accum_steps=accumulate, fault=None, rank=0)
        for epoch in range(first, first + epochs):
            fork.train_one_epoch(
                epoch, self.task.get_trainable_module(), self.loader, self.optimizer, args, task=self.task,
                amp_autocast=self.region, loss_scaler=self.scaler,
            )  # fmt: skip
            fork.validate(self.model, self.loader, nn.CrossEntropyLoss(), args, amp_autocast=self.region)
        self.checker.detach()


@pytest.fixture
def script() -> Callable[..., Script]:
    def script(layer: type[nn.Module], numerics: str, step: int = STEP) -> Script:
        return Script(layer(step=step), numerics, "float16" if getattr(layer, "only_float16", True) else "bfloat16")

    return script


def numeric(script: Script) -> list[Finding]:
    assert script.checker.report is not None
    findings = script.checker.report.findings
    return [one for one in findings if one.code.startswith("AMP5") and one.code not in ("AMP512", "AMP515")]


@pytest.mark.parametrize("layer", LAYERS)
def test_guard(script: Any, layer: type[Late]) -> None:
    run = script(layer, "guard")
    run.run()
    (finding,) = numeric(run)
    assert_true(finding, layer, "layer")


@pytest.mark.parametrize("layer", [Scores, Angle])
def test_stop(script: Any, layer: type[Late]) -> None:
    run = script(layer, "stop")
    weights: list[dict[str, Tensor]] = []
    run.model.register_forward_pre_hook(lambda *_: weights.append(copy.deepcopy(dict(run.model.named_parameters()))))
    with pytest.raises(FloatingPointError, match=f"of step {STEP} is not finite") as raised:
        run.run()
    (finding,) = numeric(run)
    assert_true(finding, layer, "layer")
    assert finding.code in raised.value.__notes__[0]
    assert finding.host_fix == FIXES.get(f"{finding.code}:bfloat16")
    run.checker.detach()
    assert all(torch.equal(value, weights[-1][name]) for name, value in run.model.named_parameters())


def test_free_finds_statistics_at_the_next_stop(script: Any) -> None:
    run = script(Statistics, "free")
    run.run()
    (finding,) = numeric(run)
    assert finding.code == "AMP511"
    assert finding.evidence["moment"] == "at the end of epoch 0"
    assert finding.evidence["buffers"] == ["layer.norm.running_mean", "layer.norm.running_var"]
    assert finding.host_fix == FIXES["AMP511"]


@pytest.mark.parametrize(("first", "accumulate", "step"), [(0, 1, STEP), (0, 2, STEP // 2), (3, 1, None)])
def test_step_is_the_optimizer_s(script: Any, first: int, accumulate: int, step: int | None) -> None:
    run = script(Angle, "guard")
    run.run(first=first, accumulate=accumulate)
    (finding,) = numeric(run)
    assert_true(finding, Angle, "layer", step)


def test_healthy_run_says_nothing_and_is_bit_identical(script: Any, caplog: pytest.LogCaptureFixture) -> None:
    def trained(numerics: str) -> tuple[Any, ...]:
        torch.manual_seed(0)
        caplog.clear()
        run = script(Scores, numerics, step=99)
        run.run()
        assert run.checker.report.findings == ()
        lines = [record.getMessage() for record in caplog.records if "not judged" not in record.getMessage()]
        assert len([line for line in lines if line.startswith("ampcheck")]) == 3
        tensors = [*run.model.state_dict().values(), torch.get_rng_state()]
        return run.losses, [one.reshape(-1).view(torch.uint8).numpy().tobytes() for one in tensors]

    plain = trained("off")
    for numerics in ("free", "guard", "stop"):
        assert trained(numerics) == plain


@pytest.mark.parametrize("numerics", ["free", "guard", "stop"])
def test_nothing_stays_behind(script: Any, numerics: str) -> None:
    engine, step = torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__
    one = script(Angle, numerics)
    try:
        one.run()
    except FloatingPointError:
        assert numerics == "stop"
        one.checker.detach()
    assert (torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__) == (engine, step)
    run = one.checker._run
    assert (run.held, run.numerics, run.find_batch) == (None, None, None)
