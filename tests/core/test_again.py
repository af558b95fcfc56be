"""A plain loop that fails after its watched steps: its last statements are run again, and name the lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loops import CNN, MACHINE, batches, evaluate, sgd, train
from torch.nn import functional as F

import ampcheck


class Late(CNN):
    """Writes in place to what autograd has saved, from one training call on."""

    def __init__(self, wrong_from: int) -> None:
        super().__init__()
        self.wrong_from = wrong_from
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        x = self.pool(self.act(self.norm(self.conv(images)))).flatten(1).sigmoid()
        if self.training and self.calls >= self.wrong_from:
            x *= 2
        return self.head(x)


class Crashing(CNN):
    """Its third call meets two dtypes."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls == 3:
            with torch.autocast("cpu", enabled=False):
                return self.head(super().forward(images).half())
        return super().forward(images)


def note_of(model, steps, loop=train, **options):
    optimizer = sgd(model)
    watch = ampcheck.watch(model, optimizer=optimizer, ignore=MACHINE, emit=lambda _: None, **options)
    with pytest.raises(RuntimeError) as raised, watch:
        loop(model, optimizer, steps=steps)
    (note,) = raised.value.__notes__
    return note


def evaluating(model, optimizer, *, steps):
    train(model, optimizer, steps=2)
    evaluate(model)
    train(model, optimizer, steps=steps)


def accumulating(model, optimizer, *, steps):
    for step, (images, labels) in enumerate(batches(steps)):
        F.cross_entropy(model(images), labels).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("watched", [0, 1, 2])
@pytest.mark.parametrize("failing", [1, 3, 40])
@pytest.mark.parametrize("loop", [train, evaluating, accumulating])
def test_the_lines_of_a_later_step_are_named(failing, watched, loop):
    note = note_of(Late(failing), 50, loop, watch_steps=watched)
    assert "x *= 2" in note
    assert "written here" in note
    assert "saved here" in note


def test_what_the_frames_tell():
    assert "error[AMP203]" in note_of(Crashing(), 5)


SCRIPT = """
import argparse
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--name")
parser.add_argument("--from", dest="start", type=int)
args = parser.parse_args()
layer, optimizer = torch.nn.Linear(4, 4), None
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for step in range(1, 9):
    optimizer.zero_grad()
    y = layer(torch.ones(2, 4)).sigmoid()
    if step >= args.start:
        y += 1
    y.sum().backward()
    optimizer.step()
"""


def test_a_script_and_the_values_of_its_options(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "ampcheck",
        "run",
        "--ignore",
        "AMP107",
        "train.py",
        "--name",
        "s3cr3t",
        "--from",
        "5",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "y += 1" in done.stderr
    assert "written here" in done.stderr
    assert "s3cr3t" not in done.stderr + done.stdout
