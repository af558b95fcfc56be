"""Train scripts as timm's were before it had tasks, which forks of it still are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")
pytest.importorskip("torchvision")

SCRIPT = Path(__file__).with_name("timm_older_train.py")
SHIM = ("-m", "ampcheck.integrations.timm", "--ignore", "AMP107")
BFLOAT16 = ("--amp", "--amp-dtype", "bfloat16")


def run(*arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_healthy_run_is_checked_and_the_same_to_the_bit(tmp_path: Path) -> None:
    bare = run(SCRIPT, *BFLOAT16, "--model-ema", cwd=tmp_path)
    checked = run(*SHIM, SCRIPT, *BFLOAT16, "--model-ema", "--output", tmp_path, cwd=tmp_path)
    assert (bare.returncode, checked.returncode) == (0, 0), checked.stderr
    assert checked.stdout.count("loss 0x") == 2
    assert checked.stdout == bare.stdout
    report = json.loads((tmp_path / "ampcheck.json").read_text())
    assert (report["findings"], report["precision"]["source"]) == ([], "--amp --amp-dtype bfloat16")
    assert {"training", "evaluation"} <= set(checked.stderr.split())


def test_evaluation_without_autocast(tmp_path: Path) -> None:
    done = run(*SHIM, SCRIPT, *BFLOAT16, "--fault", "evaluation", "--output", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [one["code"] for one in json.loads((tmp_path / "ampcheck.json").read_text())["findings"]] == ["AMP105"]


def test_a_misspelled_autocast_in_the_loss(tmp_path: Path) -> None:
    done = run(*SHIM, SCRIPT, "--fault", "autocast", cwd=tmp_path)
    assert done.returncode == 1
    assert "error[AMP102]" in done.stderr
    assert "timm_older_train.py" in done.stderr
