"""A training run of Ultralytics, for faults to be thrown into."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from injection import Program, held

# What stands in the place of the host's own methods.
CONTAINS: tuple[str, ...] = ("AmpCheck._train", "AmpCheck._val", "AmpCheck._guard")
# Before the run: the user's own calls.
NUMBER = itertools.count()


def run(dies: bool) -> Program:
    pytest.importorskip("ultralytics")
    from hosts import test_ultralytics as tests
    from hosts.ultralytics_scenes import detector, draw_scenes
    from ultralytics import YOLO

    from ampcheck.integrations.ultralytics import AmpCheck

    root = Path.cwd() / ("dies" if dies else "trains")
    root.mkdir()
    data = draw_scenes(root / "data", train=16, val=8)

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        model = YOLO(detector(root))
        models.append(model)
        if told is not None:
            AmpCheck(ignore="AMP107").attach(model)
        if dies:

            def fail(trainer: Any) -> None:
                raise LookupError("the user's own")

            model.add_callback("on_train_batch_end", fail)
        with arm():
            model.train(
                data=str(data), project=str(root / f"runs{next(NUMBER)}"), trainer=tests.AmpTrainer, **tests.QUIET
            )
        return held(model.trainer.model)

    return program
