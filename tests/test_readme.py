"""The README against the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_commands_name_files_and_modules_that_exist():
    for path in re.findall(r"(?:examples|benchmarks|tests)/[\w/]+\.py", TEXT):
        assert (README.parent / path).is_file(), path
    for module in re.findall(r"-m ampcheck\.(\w+)\.(\w+)", TEXT):
        assert (README.parent / module[0] / f"{module[1]}.py").is_file(), module


def test_the_explained_crash_is_what_the_command_prints():
    pytest.importorskip("sklearn")
    script = re.findall(r"ampcheck run (examples/\w+\.py)", TEXT)[0]
    (shown,) = re.findall(r"```\nRuntimeError: .*?\n(ampcheck: .*?)```", TEXT, re.DOTALL)
    command = [sys.executable, "-m", "ampcheck", "run", script]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run(command, cwd=README.parent, env=environment, capture_output=True, encoding="utf-8")
    assert ran.returncode == 1
    # Long lines are wrapped in the README.
    assert " ".join(ran.stderr.split()).endswith(" ".join(shown.split()))


def test_the_explained_overflow_is_what_the_command_prints():
    pytest.importorskip("sklearn")
    script = re.findall(r"ampcheck run (examples/\w+\.py)", TEXT)[1]
    (shown,) = re.findall(r"```\n(error\[AMP502\].*?)```", TEXT, re.DOTALL)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "ampcheck", "run", script]
    ran = subprocess.run(command, cwd=README.parent, env=environment, capture_output=True, encoding="utf-8")
    assert ran.returncode == 0

    # The last digits differ from one machine to the next, and long lines are wrapped in the README.
    def worded(text: str) -> str:
        return " ".join(re.sub(r"-?\d+\.\d+(e\+\d+)?", "#", text).split())

    assert worded(shown) in worded(ran.stderr)


def test_the_detector_config_keeps_the_hooks_of_its_base(tmp_path):
    config = pytest.importorskip("mmengine.config").Config
    (text,) = re.findall(r"```python\n(_base_ = .*?)```", TEXT, re.DOTALL)
    (base,) = re.findall(r'"(mmdet::.*?)"', text)
    (tmp_path / "base.py").write_text(
        "custom_hooks = [dict(type='EMAHook'), dict(type='PipelineSwitchHook')]\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.004))\n"
    )
    (tmp_path / "detector.py").write_text(text.replace(base, "base.py"))
    loaded = config.fromfile(tmp_path / "detector.py")
    assert [hook["type"] for hook in loaded.custom_hooks] == ["EMAHook", "PipelineSwitchHook", "AmpCheckHook"]
    assert loaded.optim_wrapper.type == "AmpOptimWrapper"
    assert loaded.optim_wrapper.optimizer.type == "AdamW"
