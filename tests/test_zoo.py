"""A sample of the zoo of healthy models, and that the zoo tells a sick one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo.__main__ import is_bad, sampled
from zoo.recipe import Recipe, Training, classifier
from zoo.trial import tried

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("options", [("--only", "sequence/*", "--sample", "6"), ("--only", "loop/[ct]*")], ids=" ".join)
def test_sample_gets_no_error_and_trains_to_the_bit(options, tmp_path):
    command = [sys.executable, "-m", "benchmarks.zoo", *options, "--json", str(tmp_path / "zoo.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout
    runs = json.loads((tmp_path / "zoo.json").read_text())["runs"]
    assert len(runs) >= 3
    assert {run["outcome"] for of_model in runs.values() for run in of_model} <= {"healthy", "fails alone"}
    assert all(of_model[0]["outcome"] == "healthy" for of_model in runs.values())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))


def test_error_is_bad():
    def build() -> Training:
        training = classifier(model := net(), torch.randn(2, 4))
        training.optimizers = [torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)]
        return training

    run = tried(Recipe("optimizer of a copy", "sick", build), "fp32")
    assert [finding["code"] for finding in run["findings"]] == ["AMP309"]
    assert is_bad(run)


def test_other_training_is_bad():
    class Sensitive(Training):
        def step(self, precision):
            with torch.no_grad():
                self.model[0].bias += "importlib" in torch.autocast.__enter__.__code__.co_filename
            return super().step(precision)

    def build() -> Training:
        inner = classifier(net(), torch.randn(2, 4))
        return Sensitive(inner.model, inner.loss, inner.predict)

    run = tried(Recipe("trains otherwise where it is watched", "sick", build), "bf16")
    assert run["outcome"] == "differs"
    assert is_bad(run)


def test_what_fails_alone_says_nothing_about_ampcheck():
    run = tried(Recipe("broken", "sick", lambda: classifier(net(), torch.randn(2, 5))), "fp32")
    assert run["outcome"] == "fails alone"
    assert not is_bad(run)


def test_sample_is_spread_evenly():
    assert sampled(["a", "b", "c", "d"], 2) == ["a", "c"]
    assert sampled(["a", "b"], 0) == sampled(["a", "b"], 5) == ["a", "b"]
