"""Training that Ultralytics launches in processes of its own, by the file that it generates."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("YOLO_OFFLINE", "1")
pytest.importorskip("ultralytics")

from hosts.ultralytics_scenes import draw_scenes
from launch import HERE, launched, python
from ultralytics.utils.dist import generate_ddp_file

HANDS_ON_CALLBACKS = "callbacks" in generate_ddp_file.__code__.co_names
PROGRAM = str(HERE / "ultralytics_steps.py")


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))


def report(directory: Path) -> dict[str, Any]:
    (found,) = directory.rglob("ampcheck.json")
    return json.loads(found.read_text())


@pytest.mark.skipif(not HANDS_ON_CALLBACKS, reason="this Ultralytics hands no callbacks to its processes")
def test_the_processes_are_watched_and_report_once(tmp_path: Path) -> None:
    done = python(PROGRAM, str(tmp_path), cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "torch.distributed.run --nproc_per_node 2" in said
    for line in ("ampcheck  mixed", "ampcheck  watched training step", "ampcheck  watched evaluation step"):
        assert said.count(line) == 1
    assert said.count("info[AMP101]") == 1
    assert "seen on rank" not in said
    assert [finding["code"] for finding in report(tmp_path)["findings"]] == ["AMP101"]


@pytest.mark.skipif(not HANDS_ON_CALLBACKS, reason="this Ultralytics hands no callbacks to its processes")
def test_a_process_that_dies_is_explained(tmp_path: Path) -> None:
    done = python(PROGRAM, str(tmp_path), "dies", cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "CalledProcessError" in said
    assert "nothing was watched" not in said
    if sys.version_info >= (3, 11):
        assert said.count("error[AMP203]") == 1
        assert "[rank1]: error[AMP203]" in said


@pytest.mark.skipif(HANDS_ON_CALLBACKS, reason="this Ultralytics hands its callbacks to its processes")
@pytest.mark.parametrize("mode", [(), ("dies",)])
def test_what_is_not_watched_is_said(tmp_path: Path, mode: tuple[str, ...]) -> None:
    done = python(PROGRAM, str(tmp_path), *mode, cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == len(mode), said
    assert said.count("AmpCheck: nothing was watched") == 1
    assert "torchrun --nproc-per-node" in said
    assert "ampcheck  watched" not in said


def test_under_torchrun_the_same_program_is_watched(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes")
    done = launched(PROGRAM, str(tmp_path), cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("ampcheck  watched training step") == 1
    assert "nothing was watched" not in said
    assert [finding["code"] for finding in report(tmp_path)["findings"]] == ["AMP101"]
