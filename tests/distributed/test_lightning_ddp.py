"""Lightning's own launch of two processes, which starts the script anew for the second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import HERE, python

pytest.importorskip("lightning.pytorch")


def test_two_processes_give_one_report_that_names_the_rank(tmp_path: Path) -> None:
    done = python(str(HERE / "lightning_steps.py"), cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("trained on rank") == 2
    assert said.count("ampcheck  mixed bfloat16 on cpu, loss scaling off") == 1
    assert said.count("ampcheck  watched training step") == 1
    assert said.count("error[AMP101]") == 1
    (finding,) = json.loads((tmp_path / "ampcheck.json").read_text())["findings"]
    assert finding["message"].endswith("(seen on rank 1 only)")
