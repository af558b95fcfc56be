"""A plain loop that fails after its watched steps: the note says what to run to watch the failing one."""

from __future__ import annotations

import os
import re
import shlex
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


@pytest.mark.parametrize("watched", [1, 2])
@pytest.mark.parametrize("failing", [3, 7, 40])
@pytest.mark.parametrize("loop", [train, evaluating])
def test_the_number_of_the_failing_step_is_told(failing, watched, loop):
    note = note_of(Late(failing), 50, loop, watch_steps=watched)
    assert "the failing step was not among the watched ones" in note
    steps = int(re.search(r"to watch the failing step:  ampcheck\.watch\(\.\.\., watch_steps=(\d+)\)$", note)[1])
    # What is wrong in the failing step may add a node to its graph.
    assert steps in (failing, failing + 1)
    seen = note_of(Late(failing), 50, loop, watch_steps=steps)
    assert "x *= 2" in seen
    assert "written here" in seen
    assert "to watch" not in seen


def test_accumulated_batches_are_one_step():
    note = note_of(Late(7), 10, accumulating)
    assert note.endswith("watch_steps=4)")
    assert "written here" in note_of(Late(7), 10, accumulating, watch_steps=4)


def test_what_the_frames_tell_needs_no_other_run():
    note = note_of(Crashing(), 5)
    assert "error[AMP203]" in note
    assert "to watch" not in note


def test_a_watched_step_needs_no_other_run():
    assert "to watch" not in note_of(Late(1), 3)


def test_counting_steps_does_not_break_the_failure(monkeypatch):
    def again(steps):
        raise LookupError(steps)

    assert "error[AMP401]" in note_of(Late(3), 5, again=again)


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


def test_the_command_that_watches_the_failing_step(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    arguments = ["run", "--ignore", "AMP107", "--json", "a report.json", "train.py", "--name", "x y", "--from", "5"]

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "ampcheck", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 1
        return done.stderr

    first = run(*arguments)
    assert "Which line wrote was not seen: the failing step was not among the watched ones." in first
    told = re.search(r"^to watch the failing step:  ampcheck (run .*)$", first, re.MULTILINE)
    assert told is not None
    words = shlex.split(told[1])
    assert words[:2] == ["run", "--watch-steps"]
    assert words[2] in ("5", "6")
    assert words[3:] == arguments[1:]
    assert "y += 1" in run(*words)
