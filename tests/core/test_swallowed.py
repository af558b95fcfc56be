"""Exceptions that somebody shows in their own way, and the levels at which findings are logged."""

from __future__ import annotations

import enum
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ampcheck
from ampcheck import AmpChecker, Precision

LAUNCHED = """
import sys, traceback
import torch
from torch import nn

def launched(function):
    try:
        function()
    except Exception:
        traceback.print_exc(limit=1)
        sys.exit({status})

def main():
    model = nn.Linear(4, 4)
    for step in range(2):
        h = torch.sigmoid(model(torch.ones(2, 4)))
        h += 1
        h.sum().backward()

launched(main)
"""


def run(tmp_path: Path, status: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(LAUNCHED.format(status=status))
    command = [sys.executable, "-m", "ampcheck", "run", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_launcher_that_shows_the_error_and_leaves(tmp_path: Path) -> None:
    done = run(tmp_path, 1)
    assert done.returncode == 1
    assert done.stderr.count("error[AMP401]") == 1
    assert "h += 1" in done.stderr
    assert "Write `h = h + 1` at train.py:17." in done.stderr


def test_a_program_that_leaves_well_swallowed_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, 0)
    assert done.returncode == 0
    assert "error[" not in done.stderr


def test_findings_are_logged_at_their_severity(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4).half()
    checker = AmpChecker(report=False)
    precision = Precision("mixed", "cpu", "float16", True, "here")
    with caplog.at_level(logging.INFO):
        checker.attach(model, precision=precision, scaler=torch.amp.GradScaler("cpu"), log=logging.getLogger("fit").log)
        checker.detach()
    levels = {record.levelno for record in caplog.records if "[AMP201]" in record.getMessage()}
    assert levels == {logging.ERROR}
    assert caplog.records[0].levelno == logging.INFO


class Mode(enum.Enum):
    TRAIN = 1


class Sealed:
    """Refuses to be written to once it is made."""

    __slots__ = ("sealed", "value")

    def __init__(self) -> None:
        self.value = 1
        self.sealed = True

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, "sealed"):
            raise AttributeError("read only")
        super().__setattr__(name, value)


def test_a_replay_leaves_alone_what_cannot_be_written_to() -> None:
    told: list[str] = []
    mode, sealed = Mode.TRAIN, Sealed()
    model = nn.Linear(4, 4)

    def train() -> None:
        with ampcheck.watch(model, emit=told.append, report=False):
            for _ in range(2):
                h = torch.sigmoid(model(torch.ones(2, 4)) * mode.value * sealed.value)
                h += 1
                h.sum().backward()

    with pytest.raises(RuntimeError, match="modified by an inplace") as caught:
        train()
    assert "h += 1" in getattr(caught.value, "__notes__", [""])[0]
    assert not [line for line in told if "AMP900" in line]
