"""A run under MMEngine, for faults to be thrown into."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from injection import Program, held

# What stands in the place of the host's own methods.
CONTAINS: tuple[str, ...] = ()
# Before the run: the user's own calls.
NUMBER = itertools.count()


def run(dies: bool) -> Program:
    pytest.importorskip("mmengine")
    from hosts import test_mmengine as tests
    from mmengine.config import Config
    from mmengine.runner import Runner

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        config = Config.fromfile(tests.CONFIG)
        number = next(NUMBER)
        config.work_dir, config.experiment_name = f"run{number}", f"faults{number}"
        config.custom_hooks = [{"type": "AmpCheckHook", "ignore": "AMP107"}] if told is not None else []
        config.train_dataloader.dataset.count = 48
        config.val_dataloader.dataset.count = 32
        if dies:
            config.model.type = "MistypedDigitsNet"
        runner = Runner.from_cfg(config)
        models.append(runner.model)
        with arm():
            runner.train()
        return held(runner.model)

    return program
