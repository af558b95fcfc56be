"""A fault in any function of an adapter, in its real host: the run goes on to the bit, and one warning tells of it."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from injection import Point, Program, Run, Tracer, run
from loops import same

from ampcheck import AmpChecker

# What contains the faults of all others, and what a host's own attribute is replaced by.
CONTAINS = {
    "session": (
        *("contained.call", "Session._guarded", "Session._training_step", "Session._evaluation_step"),
        "Session.fail",
    ),
    "lightning": (),
    "mmengine": (),
    "timm": ("_contained.call", "_Script._train", "_Script._validate", "_Updates._wrap.wrapper", "_Returned.__call__"),
    "ultralytics": ("AmpCheck._train", "AmpCheck._val", "AmpCheck._guard"),
}
# A fault there costs the replay alone, or is taken for the script's own.
DETAILS = (
    *("failing_batch", "_Fit.find_batch", "variables", "_instead", "_nothing"),
    *("_failing_batch", "_arguments_of_step", "_step_again", "_loss", "_alone"),
    "_dtype_of_regions",
)
# Before the run: the user's own calls.
NUMBER = itertools.count()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Every record that is logged."""
    lines: list[str] = []
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        lines.append(made.getMessage())
        return made

    logging.setLogRecordFactory(record)
    yield lines
    logging.setLogRecordFactory(make)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def held(model: torch.nn.Module, *more: Any) -> dict[str, Any]:
    return {"model": copy.deepcopy(model.state_dict()), "more": copy.deepcopy(more)}


def every_point(host: str, program: Program, said: list[str], done_before: set[Point]) -> None:
    """Run ``program`` once for each function of the adapter that it reaches, and that is not among ``done_before``,
    with a fault in that function."""

    def told(arm: Any = contextlib.nullcontext, *, without: bool = False) -> Run:
        said.clear()
        done = run(lambda arm, told, models: program(arm, None if without else told, models), arm)
        done.told += said
        return done

    told(without=True)
    plain = told(without=True)
    # Each run ends in garbage collections: keep them to what the run has made.
    gc.collect()
    gc.freeze()
    tracer = Tracer()
    healthy = told(tracer)
    assert healthy.faults == []
    assert same(healthy.result, plain.result)
    ours = [point for point in tracer.points if point.file.endswith((f"{host}.py", "session.py"))]
    contains = (*CONTAINS["session"], *CONTAINS[host])
    points = [point for point in ours if point.name not in contains and point not in done_before]
    assert len(ours) > 5
    done_before.update(ours)
    wrong = []
    for point in points:
        tracer = Tracer(point)
        done = told(tracer)
        notes = " ".join(done.notes)
        problems = {
            "not fired": not tracer.fired,
            "another end": type(done.error) is not type(plain.error) or str(done.error) != str(plain.error),
            "not bit-identical": not same(done.result, plain.result),
            "left behind": done.left != {},
            "model kept": done.alive > plain.alive,
            "warnings": len(done.faults) != 1 and point.name not in DETAILS and "injected" not in notes,
        }
        found = [name for name, is_so in problems.items() if is_so]
        if found:
            wrong.append((str(point), found, repr(done.error), done.faults, [*done.left]))
    gc.unfreeze()
    assert not wrong, "\n".join(map(str, wrong))


def the_lightning_run(dies: bool) -> Program:
    lightning = pytest.importorskip("lightning.pytorch")
    from hosts import lightning_digits as digits

    from ampcheck.integrations.lightning import AmpCheck

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        module = digits.digits_module(lightning, training=digits.misspelled if dies else contextlib.nullcontext)
        models.append(module)
        callbacks = [AmpCheck(ignore="AMP107")] if told is not None else []
        trainer = digits.trainer(lightning, *callbacks, precision="bf16-mixed", num_sanity_val_steps=0)
        with arm():
            trainer.fit(module, digits.loader(count=32), digits.loader("val", 16))
        return held(module, module.losses)

    return program


def the_mmengine_run(dies: bool) -> Program:
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


def the_timm_run(dies: bool) -> Program:
    pytest.importorskip("timm")
    from hosts.test_timm import Fork

    from ampcheck.integrations.timm import install

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        fork = Fork()
        models.append(fork.model)
        script = type(sys)("fork")
        script.train_one_epoch, script.validate = fork.train_one_epoch, fork.validate
        checker = AmpChecker(report=False, ignore="AMP107")
        if told is not None:
            install(script, checker=checker)
        options = {
            "amp_autocast": partial(torch.autocast, device_type="cpu", dtype=torch.float16),
            "loss_scaler": fork.scaler,
        }
        images = torch.ones(2, 3, 32, 32)
        batches = [images] * 2 + ([images.double()] if dies else [])
        try:
            with arm():
                script.train_one_epoch(0, fork.model, batches, opt=fork.optimizer, **options)
                script.validate(fork.model, [images], options["amp_autocast"])
        finally:
            checker.detach()
        return held(fork.model)

    return program


def the_ultralytics_run(dies: bool) -> Program:
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


RUNS: dict[str, Callable[[bool], Program]] = {
    "lightning": the_lightning_run,
    "mmengine": the_mmengine_run,
    "timm": the_timm_run,
    "ultralytics": the_ultralytics_run,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("host", RUNS)
def test_fault_in_the_adapter(host: str, said: list[str]) -> None:
    done: set[Point] = set()
    for dies in (False, True):
        every_point(host, RUNS[host](dies), said, done)
