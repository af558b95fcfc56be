"""A failure of timm's train script after the watched step: the failing batch is replayed, and named as if watched."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("timm.task", reason="this timm's train script is an older one")

from digits import digits, upscaled
from hosts import timm_train
from hosts.timm_digits import (
    BACKBONE,
    LATE,
    SIZE,
    CastNet,
    DigitNet,
    LargeNet,
    failure_of,
    line_of,
    names_the_dropout_line,
    note_of,
    state_of,
)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from ampcheck import AmpChecker
from ampcheck.integrations.timm import FIXES, install

REGIONS: dict[str, Callable[[], Any]] = {
    "float32": suppress,
    "bfloat16": partial(torch.autocast, device_type="cpu", dtype=torch.bfloat16),
    "float16": partial(torch.autocast, device_type="cpu", dtype=torch.float16),
}


class Run:
    """What `main` of timm's train script makes before it calls `train_one_epoch`."""

    def __init__(self, model: nn.Module, precision: str = "bfloat16", batches: int = 5) -> None:
        self.model = model
        self.task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        self.task.setup_ema(decay=0.9)
        self.optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)
        self.regions = REGIONS[precision]
        self.scaler = NativeScaler(device="cpu") if precision == "float16" else None
        images, labels = digits("train", 4 * batches)
        self.loader = DataLoader(TensorDataset(upscaled(images, SIZE), labels), batch_size=4)
        self.checker = AmpChecker(ignore="AMP107,AMP310")
        self.states: list[dict[str, Any]] = []

    def train(self, script: ModuleType | None = None) -> Exception:
        """Train with `train_one_epoch` under the checker until it fails; ``states`` are those around the diagnosis."""
        fork = script or ModuleType("fork")
        if script is None:
            vars(fork).update(vars(timm_train))
        install(fork, checker=self.checker)
        diagnose = self.checker.diagnose

        def between(*args: Any, **kwargs: Any) -> None:
            self.states.append(self.state())
            diagnose(*args, **kwargs)
            self.states.append(self.state())

        self.checker.diagnose = between  # type: ignore[method-assign]
        args = argparse.Namespace(grad_accum_steps=1, fault=None, rank=0)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            fork.train_one_epoch(
                0,
                self.task.get_trainable_module(),
                self.loader,
                self.optimizer,
                args,
                task=self.task,
                amp_autocast=self.regions,
                loss_scaler=self.scaler,
            )
        return raised.value

    def state(self) -> dict[str, Any]:
        return state_of(self.model, self.task.trainable_module_ema, self.optimizer, self.scaler and self.scaler._scaler)


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", REGIONS)
@pytest.mark.parametrize("step", [1, LATE], ids=["watched", "replayed"])
def test_the_user_s_dropout_is_named_and_timm_is_not_blamed(step: int, precision: str) -> None:
    run = Run(DigitNet(step), precision)
    error = run.train()
    assert "modified by an inplace operation" in str(error)
    finding = failure_of(run.checker)
    names_the_dropout_line(finding)
    assert finding.host_fix == FIXES["AMP401"]
    assert finding.evidence["dtype"] == precision
    note = note_of(error)
    assert "create_model(..., drop_rate=...)" in note
    blamed = [line for line in note.splitlines() if line.lstrip().startswith("fix")]
    assert blamed
    assert not any("site-packages" in line or "backbone" in line for line in blamed)
    before, after = run.states
    assert before["calls"] == [step]
    for what, value in before.items():
        assert after[what] == value, what


def test_the_gradients_of_an_unfinished_update_are_left_alone() -> None:
    run = Run(DigitNet())
    run.optimizer.zero_grad = lambda *_: None  # type: ignore[method-assign]
    run.train()
    before, after = run.states
    assert any(gradient for _, gradient in before["gradients"].values())
    assert before == after


def test_a_dtype_crash_in_a_later_step_has_its_reason() -> None:
    run = Run(CastNet())
    error = run.train()
    finding = failure_of(run.checker)
    assert (finding.code, finding.module) == ("AMP203", "classifier")
    assert finding.evidence["reason"] == "autocast-disabled-here"
    assert finding.host_fix == FIXES["AMP203"]
    region = next(site for site in finding.sites if "enabled=False" in site.code)
    assert region.line == line_of("enabled=False", CastNet)
    assert "enabled=False" in note_of(error)
    assert run.states[0] == run.states[1]


def test_memory_that_runs_out_in_the_replay_leaves_what_the_frames_tell() -> None:
    run = Run(LargeNet())
    error = run.train()
    assert "modified by an inplace operation" in str(error)
    finding = failure_of(run.checker)
    assert finding.code == "AMP401"
    assert "a replay of the failing batch ran out of memory" in finding.message
    assert {site.role for site in finding.sites} <= {"raise"}
    assert run.states[0] == run.states[1]


def test_a_script_without_a_task() -> None:
    script = ModuleType("legacy_train")
    script.train_one_epoch = train_with_model_and_loss  # type: ignore[attr-defined]
    run = Run(DigitNet())
    run.task.trainable_module = run.model
    run.train(script)
    names_the_dropout_line(failure_of(run.checker))
    assert run.states[0] == run.states[1]


def train_with_model_and_loss(
    epoch: int, model: Any, loader: Any, optimizer: Any, args: Any, amp_autocast: Any = suppress, **_: Any
) -> None:
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    for input, target in loader:

        def _forward() -> Tensor:
            with amp_autocast():
                output = model(input)  # noqa: B023
                return loss_fn(output, target)  # noqa: B023

        optimizer.zero_grad()
        _forward().backward()
        optimizer.step()


def test_a_loop_that_names_its_batch_otherwise_gets_what_the_frames_tell() -> None:
    def train_one_epoch(
        epoch: int, model: Any, loader: Any, optimizer: Any, args: Any, amp_autocast: Any = suppress, **_: Any
    ) -> None:
        for images, labels in loader:
            with amp_autocast():
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    script = ModuleType("other_train")
    script.train_one_epoch = train_one_epoch  # type: ignore[attr-defined]
    run = Run(DigitNet())
    error = run.train(script)
    finding = failure_of(run.checker)
    assert finding.code == "AMP401"
    assert "AmpCheck did not see" in finding.message
    assert "AMP401" in note_of(error)
    assert run.states[0] == run.states[1]


def test_a_replay_goes_around_the_wrapper_of_several_processes(tmp_path: Path) -> None:
    run = Run(DigitNet())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run.task.prepare_distributed()
        calls: list[bool] = []
        run.task.trainable_module.register_forward_pre_hook(lambda *_: calls.append(True))
        run.train()
    finally:
        torch.distributed.destroy_process_group()
    names_the_dropout_line(failure_of(run.checker))
    assert len(calls) == LATE
    assert run.states[0] == run.states[1]


def test_a_healthy_run_replays_nothing() -> None:
    run = Run(DigitNet(100))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        run.train()
    run.checker.detach()
    assert run.model.calls == len(run.loader)
    assert run.states == []
    assert run.checker.report is not None
    assert not run.checker.report.findings


MODEL = f"""
from timm.models import register_model


class DigitNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.backbone = create_model({BACKBONE!r}, num_classes=0)
        self.classifier = nn.Linear(self.backbone.head_hidden_size, num_classes)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.backbone(x)
        x = nn.functional.dropout(x, 0.2, self.training, inplace=self.calls >= {LATE})
        return self.classifier(x)


@register_model
def digit_net(pretrained=False, num_classes=10, **kwargs):
    return DigitNet(num_classes)


"""


def test_from_the_command_line(tmp_path: Path) -> None:
    source = Path(timm_train.__file__).read_text()
    script = tmp_path / "train.py"
    script.write_text(source.replace("class DigitImages", MODEL + "class DigitImages", 1))
    command = ["-m", "ampcheck.integrations.timm", "--ignore", "AMP107", "train.py", "--model", "digit_net"]
    run = subprocess.run(
        [sys.executable, *command, "--amp", "--amp-dtype", "bfloat16", "--images", "32", "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout.count("step ") == LATE - 1
    line = next(i for i, text in enumerate(script.read_text().splitlines(), 1) if "inplace=self.calls" in text)
    note = run.stderr[run.stderr.index("ampcheck: what is known of this failure") :]
    assert "error[AMP401] saved-tensor-modified: The output of relu was modified in place" in note
    assert "   train.py\n" in note
    assert f"{line} │ x = nn.functional.dropout(" in note
    assert "in backbone.norm_head.act" in note
    assert "site-packages" not in next(text for text in note.splitlines() if text.startswith("   fix"))
