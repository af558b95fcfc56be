"""A watched step changes no operation: the probes are modes, and PyTorch computes some things otherwise below one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

pytest.importorskip("expecttest")


def test_every_op_is_the_same_in_a_watched_step(count: Callable[[str], None]) -> None:
    samples = 2 if settings.default.max_examples <= 60 else 30
    program = [sys.executable, str(Path(__file__).parent / "every_op.py"), str(samples)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    for _ in range(told["compared"]):
        count("programs")
    assert told["operations"] > 400
    assert told["compared"] > 1000
    assert told["differing"] == {}
