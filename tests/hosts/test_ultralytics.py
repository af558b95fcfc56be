"""AmpCheck in Ultralytics: real YOLO models from yaml, trained on digits."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

os.environ.setdefault("YOLO_OFFLINE", "1")
pytest.importorskip("ultralytics")

from cases.hosts_ultralytics import AmpTrainer
from hosts.ultralytics_scenes import YAML, detector, draw_scenes, sort_into_folders
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, torch_utils

from ampcheck import AmpChecker, Finding, FindingsError, Severity
from ampcheck.integrations.ultralytics import FIXES, AmpCheck

QUIET = {"imgsz": 64, "batch": 8, "epochs": 1, "workers": 0, "plots": False, "device": "cpu", "verbose": False}

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class AmpClassifier(ClassificationTrainer):
    amp = property(lambda self: True, lambda self, value: None)


class ScalingTrainer(AmpTrainer):
    """With a scaler that scales on a CPU too."""

    scaler = property(
        lambda self: vars(self).setdefault("_scaler", torch.amp.GradScaler("cpu")), lambda self, value: None
    )


def can_train_as_on_a_gpu() -> None:
    """Skips a test where Ultralytics enters CUDA's autocast, whatever the device is."""
    if not hasattr(torch_utils, "autocast"):
        pytest.skip("this Ultralytics has AMP for CUDA alone")


def validate_as_on_a_gpu(validator: Any) -> None:
    can_train_as_on_a_gpu()
    if validator.training:
        validator.args.quantize = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sort_into_folders(tmp_path_factory.mktemp("folders"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What Ultralytics' logger said."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)


def takes(amp: str) -> bool:
    """Whether this Ultralytics takes that for ``amp=``."""
    try:
        get_cfg(overrides={"amp": amp})
    except (TypeError, ValueError):
        return False
    return True


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., YOLO]:
    """Train a tiny detector on scenes; ``attach`` gets the model before that."""

    def train(attach: Callable[[YOLO], object] = lambda model: None, *, yaml: str = YAML, **arguments: Any) -> YOLO:
        if issubclass(arguments.get("trainer", object), (AmpTrainer, AmpClassifier)):
            can_train_as_on_a_gpu()
        if isinstance(arguments.get("amp"), str) and (takes("no dtype") or not takes("bf16")):
            pytest.skip("in this Ultralytics `amp=` names no dtype")
        model = YOLO(detector(tmp_path, yaml))
        attach(model)
        model.train(**{"data": str(data), "project": str(tmp_path / "runs"), **QUIET, **arguments})
        return model

    return train


def connect(check: AmpCheck, path: str, model: YOLO) -> None:
    """Give ``check`` the model by one of the two ways."""
    if path == "attach":
        assert check.attach(model) is model
    else:
        for event, function in check.callbacks.items():
            model.add_callback(event, function)


def on_any_cpu(**options: Any) -> AmpChecker:
    """Whether AMP107 holds depends on the machine's CPU."""
    return AmpChecker(ignore="AMP107", **options)


def codes(checker: AmpChecker) -> list[str]:
    assert checker.report is not None
    return [finding.code for finding in checker.report.findings]


def only(checker: AmpChecker) -> Finding:
    assert checker.report is not None
    (finding,) = checker.report.findings
    return finding


def said(log: list[str]) -> list[str]:
    # Ultralytics puts the level before the text.
    lines = [re.sub(r"^\n?(?:(?:WARNING|ERROR) \S+ )?", "", line) for line in log]
    return [line for line in lines if line.startswith(("ampcheck  ", "error[", "warning[", "info["))]


def test_amp_left_at_its_default_on_a_cpu_is_information(train: Any, log: list[str]) -> None:
    checker = on_any_cpu()
    model = train(AmpCheck(checker=checker).attach)
    finding = only(checker)
    assert (finding.code, finding.severity) == ("AMP101", Severity.INFO)
    assert "Ultralytics' default amp=True" in finding.message
    assert finding.host_fix == FIXES["AMP101"]
    assert "`amp=False`" in FIXES["AMP101"]
    assert any(line.startswith("info[AMP101] autocast-not-active") for line in said(log))
    written = json.loads((model.trainer.save_dir / "ampcheck.json").read_text())
    assert written["host"]["name"] == "ultralytics"
    assert [finding["code"] for finding in written["findings"]] == ["AMP101"]
    assert written["precision"]["mode"] == "mixed"
    assert any(row["name"] == "model.0.conv" and row["calls"] for row in written["modules"])


def test_amp_asked_for_on_a_cpu_is_an_error(train: Any) -> None:
    checker = on_any_cpu()
    train(AmpCheck(checker=checker).attach, amp=True)
    assert (only(checker).code, only(checker).severity) == ("AMP101", Severity.ERROR)
    assert "asked for by amp=True" in only(checker).message


def test_amp_off_is_healthy(train: Any, log: list[str]) -> None:
    checker = on_any_cpu()
    train(AmpCheck(checker=checker).attach, amp=False)
    assert codes(checker) == []
    assert said(log)[0].startswith("ampcheck  true float32 on cpu · 177.1 k parameters float32 · ")
    assert [line for line in said(log)[:3] if line.endswith("· no findings")] == said(log)[:3]


@pytest.mark.parametrize("path", ["attach", "callbacks"])
def test_amp_as_on_a_gpu_is_healthy(train: Any, log: list[str], path: str) -> None:
    checker = on_any_cpu()
    check = AmpCheck(checker=checker)

    def attach(model: YOLO) -> None:
        model.add_callback("on_val_start", validate_as_on_a_gpu)
        connect(check, path, model)

    train(attach, trainer=AmpTrainer)
    assert codes(checker) == []
    start, training, evaluation = said(log)[:3]
    assert re.fullmatch(r"ampcheck  mixed .* on cpu · 177\.1 k parameters float32 · \d+ modules · no findings", start)
    assert "watched training step" in training
    assert "under autocast bfloat16" in training
    assert "watched evaluation step" in evaluation
    assert "under autocast bfloat16" in evaluation


def test_amp_in_float16_with_a_scaler_is_healthy(train: Any, log: list[str]) -> None:
    checker = on_any_cpu()

    def attach(model: YOLO) -> None:
        model.add_callback("on_val_start", validate_as_on_a_gpu)
        AmpCheck(checker=checker).attach(model)

    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        train(attach, trainer=ScalingTrainer, amp="fp16")
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert codes(checker) == []
    assert said(log)[0].startswith("ampcheck  mixed float16 on cpu, loss scaling on · ")


def test_a_classifier_is_checked_too(folders: Path, tmp_path: Path) -> None:
    can_train_as_on_a_gpu()
    arguments = {**QUIET, "imgsz": 32, "data": str(folders), "project": str(tmp_path)}
    found = []
    for trainer in (ClassificationTrainer, AmpClassifier):
        checker = on_any_cpu()
        model = AmpCheck(checker=checker).attach(YOLO("yolov8n-cls.yaml"))
        model.add_callback("on_val_start", validate_as_on_a_gpu if trainer is AmpClassifier else lambda _: None)
        model.train(trainer=trainer, **arguments)
        found.append(codes(checker))
    assert found == [["AMP101"], []]


def test_another_dtype_than_the_one_asked_for(train: Any) -> None:
    checker = on_any_cpu()
    train(AmpCheck(checker=checker).attach, trainer=AmpTrainer, amp="fp16", val=False)
    assert "AMP104" in codes(checker)
    finding = next(finding for finding in checker.report.findings if finding.code == "AMP104")
    assert finding.severity is Severity.ERROR
    assert "float16" in finding.message
    assert "bfloat16" in finding.message


def test_low_precision_parameters_under_amp(train: Any) -> None:
    class HalfTrainer(AmpTrainer):
        def get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
            return super().get_model(*args, **kwargs).bfloat16()

    checker = on_any_cpu()
    train(AmpCheck(checker=checker).attach, trainer=HalfTrainer)
    assert "AMP201" in codes(checker)


def test_validation_under_another_autocast(train: Any) -> None:
    def attach(model: YOLO) -> None:
        model.add_callback("on_val_start", validate_as_on_a_gpu)
        AmpCheck(checker=checker).attach(model)

    checker = on_any_cpu()
    train(attach, amp=False)
    assert (only(checker).code, only(checker).severity) == ("AMP105", Severity.WARNING)


def test_validation_in_ultralytics_own_precision_is_information(train: Any) -> None:
    checker = on_any_cpu()
    train(AmpCheck(checker=checker).attach, trainer=AmpTrainer)
    assert (only(checker).code, only(checker).severity) == ("AMP105", Severity.INFO)


class Gate(nn.Module):
    """A user's block: the keyword is wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.autocast(device=x.device.type, enabled=False):
                return x.float().sigmoid() * x
        return x


class GateInEvaluation(Gate):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training and not torch.is_grad_enabled() and x.shape[0] > 1:
            with torch.autocast(device=x.device.type, enabled=False):
                return x.float()
        return x


GATED = """\
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Gate, []]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Conv, [32, 3, 2]]
  - [[3, 4], 1, Detect, [nc]]
"""


@pytest.mark.parametrize("path", ["attach", "callbacks"])
@pytest.mark.parametrize(("block", "phase"), [(Gate, "forward"), (GateInEvaluation, "evaluation_step")])
def test_a_crash_is_explained(
    train: Any, monkeypatch: pytest.MonkeyPatch, path: str, block: type[nn.Module], phase: str
) -> None:
    monkeypatch.setattr(tasks, "Gate", block, raising=False)
    checker = on_any_cpu()
    check = AmpCheck(checker=checker)
    models: list[YOLO] = []
    in_flight: list[BaseException | None] = []

    def attach(model: YOLO) -> None:
        models.append(model)
        model.add_callback("teardown", lambda trainer: in_flight.append(sys.exc_info()[1]))
        connect(check, path, model)

    before = global_state()
    with pytest.raises(TypeError) as caught:
        train(attach, yaml=GATED, trainer=AmpTrainer)
    error = caught.value
    assert in_flight == [error]
    assert type(error) is TypeError
    assert error.args == ("autocast.__init__() got an unexpected keyword argument 'device'",)
    assert error.__cause__ is None
    (note,) = error.__notes__
    assert "error[AMP102] autocast-bad-argument" in note
    assert FIXES["AMP102"] in note
    assert note.splitlines()[0] in "".join(traceback.format_exception(error))
    assert "with torch.autocast(device=x.device.type, enabled=False):" in note
    assert checker.report.trace.failure.phase == phase
    assert global_state() == before
    trainer = models[0].trainer
    assert ours(trainer.callbacks) == ours(models[0].callbacks)
    written = json.loads((trainer.save_dir / "ampcheck.json").read_text())
    assert written["failure"]["type"] == "TypeError"
    (crash,) = (finding for finding in written["findings"] if finding["code"] == "AMP102")
    assert crash["module"] == "model.2"


def test_a_crash_of_val_is_explained(train: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "Gate", GateInEvaluation, raising=False)
    model = AmpCheck(checker=AmpChecker()).attach(YOLO(detector(tmp_path, GATED)))
    before = global_state()
    with pytest.raises(TypeError) as caught:
        model.val(data=str(data), project=str(tmp_path), **{**QUIET, "batch": 4})
    assert "AMP102" in caught.value.__notes__[0]
    assert global_state() == before
    assert ours(model.callbacks).keys() == {"on_pretrain_routine_end", "teardown"}


def test_val_alone_reports_on_what_it_evaluates(data: Path, tmp_path: Path, log: list[str]) -> None:
    model = AmpCheck().attach(YOLO(detector(tmp_path)))
    folder = model.val(data=str(data), project=str(tmp_path), **QUIET).save_dir
    assert said(log)[0].startswith("ampcheck  precision not declared · ")
    assert json.loads((folder / "ampcheck.json").read_text())["findings"] == []


def test_an_exception_that_is_being_handled_is_not_a_failure_of_training(train: Any) -> None:
    checker = on_any_cpu()

    def train_again() -> None:
        try:
            torch.autocast(device="cpu")
        except TypeError:
            train(AmpCheck(checker=checker).attach, amp=False)
            raise

    with pytest.raises(TypeError) as caught:
        train_again()
    assert checker.report.trace.training is not None
    assert checker.report.trace.failure is None
    assert not hasattr(caught.value, "__notes__")


def test_an_error_of_something_else_gets_no_note(train: Any) -> None:
    def stop(trainer: Any) -> None:
        raise LookupError("no such image")

    def attach(model: YOLO) -> None:
        AmpCheck().attach(model)
        model.add_callback("on_train_epoch_end", stop)

    before = global_state()
    with pytest.raises(LookupError, match="no such image") as caught:
        train(attach)
    assert not hasattr(caught.value, "__notes__")
    assert global_state() == before


def global_state() -> dict[str, Any]:
    """Everything process-wide that a probe could leave behind."""
    tables = {
        name: dict(value)
        for name, value in vars(module_hooks).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    return {
        **tables,
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "autocast": {name: value for name, value in vars(torch.autocast).items() if callable(value)},
        "saved tensor hooks": getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)(True),
        "autocast on": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
    }


def ours(callbacks: dict[str, list[Any]]) -> dict[str, list[Any]]:
    found = {
        event: [f for f in functions if "ampcheck" in getattr(f, "__module__", "")]
        for event, functions in callbacks.items()
    }
    return {event: functions for event, functions in found.items() if functions}


class Bits:
    """Losses as they come, and everything that training leaves, as bytes."""

    def __init__(self) -> None:
        self.losses: list[bytes] = []

    def attach(self, model: YOLO) -> None:
        model.add_callback("on_train_batch_end", lambda trainer: self.losses.append(to_bytes(trainer.loss)))

    def of(self, trainer: Any) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "model": to_bytes(trainer.model.state_dict()),
            "ema": to_bytes(trainer.ema.ema.state_dict()),
            "optimizer": to_bytes(trainer.optimizer.state_dict()),
            "scaler": trainer.scaler.state_dict(),
            "random": (random.getstate(), np.random.get_state()[1].tobytes(), to_bytes(torch.get_rng_state())),
            "metrics": trainer.metrics,
        }


def to_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: to_bytes(item) for key, item in value.items()}
    return [to_bytes(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("trainer", [DetectionTrainer, ScalingTrainer])
def test_training_is_the_same_to_the_bit(train: Any, trainer: type[DetectionTrainer]) -> None:
    arguments = {"trainer": trainer, "batch": 4, "epochs": 5, "nbs": 4, "warmup_epochs": 0}
    runs = []
    for check in (None, AmpCheck(), AmpCheck(watch_steps=3)):
        bits = Bits()

        def attach(model: YOLO, bits: Bits = bits, check: AmpCheck | None = check) -> None:
            bits.attach(model)
            if check is not None:
                check.attach(model)

        runs.append(bits.of(train(attach, **arguments).trainer))
    plain, *checked = runs
    assert len(plain["losses"]) == 20
    assert len(set(plain["losses"])) == 20
    for run in checked:
        for key, value in plain.items():
            assert run[key] == value, key


def test_nothing_stays_behind(train: Any) -> None:
    before = global_state()
    plain = train().trainer
    check = AmpCheck()
    model = train(check.attach)
    assert global_state() == before
    for of_plain, of_checked in ((plain, model.trainer), (plain.validator, model.trainer.validator)):
        assert vars(of_checked).keys() == vars(of_plain).keys()
    assert ours(model.trainer.callbacks) == {event: [function] for event, function in check.callbacks.items()}
    assert hooks_on(model.trainer.model) == hooks_on(plain.model)


def hooks_on(model: nn.Module) -> list[tuple[str, list[str], int]]:
    return [
        (name, sorted(vars(module)), sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks")))
        for name, module in model.named_modules()
    ]


def test_pickle_and_deepcopy_work_during_the_watch(train: Any, tmp_path: Path) -> None:
    sizes = []

    def copies(trainer: Any) -> None:
        sizes.append(len(pickle.dumps(trainer.model)))
        assert hooks_on(copy.deepcopy(trainer.model)) == hooks_on(trainer.model)
        pickle.dumps(trainer.ema.ema.state_dict())

    def attach(model: YOLO) -> None:
        model.add_callback("on_train_batch_end", copies)
        AmpCheck(checker=checker).attach(model)

    checker = AmpChecker(watch_steps=1)
    train(attach)
    watched, plain = sizes
    assert watched == plain


def test_a_checkpoint_of_a_watched_run_loads_without_ampcheck(train: Any) -> None:
    weights = train(AmpCheck(watch_steps=100).attach).trainer.wdir
    program = (
        "import sys; sys.modules['ampcheck'] = None\n"
        "from ultralytics import YOLO\n"
        "import torch\n"
        f"for name in ('last.pt', 'epoch0.pt', 'best.pt'):\n"
        f"    model = YOLO(f'{weights}/{{name}}')\n"
        "    print(len(model.model(torch.zeros(1, 3, 64, 64))))"
    )
    saved = weights / "epoch0.pt"
    saved.write_bytes((weights / "last.pt").read_bytes())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert b"ampcheck" not in (weights / "last.pt").read_bytes()


def test_steady_state_runs_nothing_of_ours_in_a_batch(train: Any) -> None:
    import ampcheck

    homes = (str(Path(ampcheck.__file__).parent), str(Path(sys.modules[AmpCheck.__module__].__file__).parent))
    counts: list[int] = []
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(homes)

    def begin(trainer: Any) -> None:
        nonlocal calls
        calls = 0
        sys.setprofile(profile)

    def end(trainer: Any) -> None:
        sys.setprofile(None)
        counts.append(calls)

    def attach(model: YOLO) -> None:
        model.add_callback("on_train_batch_start", begin)
        AmpCheck().attach(model)
        model.add_callback("on_train_batch_end", end)
        model.add_callback("on_val_batch_start", begin)
        model.add_callback("on_val_batch_end", end)

    train(attach, batch=4, epochs=2)
    training, evaluation = counts[0], counts[4]
    assert training > 0
    assert evaluation > 0
    assert counts[1:4] == [0, 0, 0]
    assert set(counts[5:]) == {0}


def test_fail_on_stops_training_at_the_first_watched_step(train: Any) -> None:
    batches = []

    def attach(model: YOLO) -> None:
        AmpCheck(fail_on="error").attach(model)
        model.add_callback("on_train_batch_end", batches.append)

    before = global_state()
    train(attach)
    assert len(batches) == 2
    with pytest.raises(FindingsError, match="AMP101"):
        train(attach, amp=True)
    assert len(batches) == 3
    assert global_state() == before


def test_a_batch_that_ran_out_of_memory_is_no_watched_step(train: Any) -> None:
    class Retrying(AmpTrainer):
        left = 1

        def _model_train(self) -> None:
            super()._model_train()
            criterion = self.model.init_criterion()

            def loss(*args: Any) -> Any:
                if self.left:
                    self.left -= 1
                    raise RuntimeError("CUDA out of memory.")
                return criterion(*args)

            self.model.criterion = loss

    def attach(model: YOLO) -> None:
        model.add_callback("on_val_start", validate_as_on_a_gpu)
        model.add_callback("on_train_epoch_end", lambda trainer: after_epoch.append(global_state()))
        AmpCheck(checker=checker).attach(model)

    checker = on_any_cpu()
    after_epoch: list[dict[str, Any]] = []
    before = global_state()
    trainer = train(attach, trainer=Retrying, batch=8).trainer
    assert trainer.batch_size == 4
    assert codes(checker) == []
    assert checker.report.trace.training.steps == 1
    assert after_epoch == [before]
    assert global_state() == before


def test_select_and_ignore(train: Any) -> None:
    checker = AmpChecker(ignore="AMP101")
    train(AmpCheck(checker=checker).attach)
    assert codes(checker) == []
    with pytest.raises(ValueError, match="AMP999"):
        AmpCheck(select="AMP999")


def test_report_may_be_a_path_or_left_out(train: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    model = train(AmpCheck(report=elsewhere).attach)
    assert json.loads(elsewhere.read_text())["schema"] == "ampcheck/1"
    assert not (model.trainer.save_dir / "ampcheck.json").exists()
    assert not (train(AmpCheck(report=False).attach).trainer.save_dir / "ampcheck.json").exists()


@pytest.fixture
def command(data: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m ampcheck.integrations.ultralytics`` with options and a training run on scenes."""
    yolo = [f"{name}={value}" for name, value in QUIET.items()]
    where = [f"model={detector(tmp_path)}", f"data={data}", f"project={tmp_path / 'runs'}", "name=run"]

    def command(*options: str) -> subprocess.CompletedProcess[str]:
        program = [
            sys.executable,
            "-m",
            "ampcheck.integrations.ultralytics",
            *options,
            "detect",
            "train",
            *where,
            *yolo,
        ]
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)

    return command


def test_the_yolo_command(command: Any, tmp_path: Path) -> None:
    done = command()
    assert done.returncode == 0, done.stderr
    assert "ampcheck  watched training step" in done.stdout
    assert "info[AMP101]" in done.stdout
    assert (tmp_path / "runs/run/weights/last.pt").exists()
    assert json.loads((tmp_path / "runs/run/ampcheck.json").read_text())["host"]["name"] == "ultralytics"


def test_the_yolo_command_fails_on_a_finding(command: Any, tmp_path: Path) -> None:
    done = command("--fail-on", "error", "amp=True")
    assert done.returncode == 3
    assert "error[AMP101] autocast-not-active" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs/run/weights/last.pt").exists()


def test_the_yolo_command_with_a_bad_option(command: Any) -> None:
    done = command("--select", "AMP999")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: no rule's code begins with 'AMP999'" in done.stderr.splitlines()[-1]


def test_a_version_without_what_is_read_trains_on(
    train: Any, log: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    def lose(trainer: Any) -> None:
        trainer.device, devices[:] = None, [trainer.device]

    def restore(trainer: Any) -> None:
        (trainer.device,) = devices

    def attach(model: YOLO) -> None:
        model.add_callback("on_pretrain_routine_end", lose)
        AmpCheck(checker=checker).attach(model)
        model.add_callback("on_pretrain_routine_end", restore)

    devices: list[torch.device] = []
    checker = on_any_cpu()
    model = train(attach)
    assert model.trainer.last.exists()
    assert codes(checker) == ["AMP900"]
    assert "AMP900" in "".join(log) + capfd.readouterr().err


def test_bad_input_is_one_clear_line() -> None:
    with pytest.raises(TypeError, match="takes a YOLO model or an Ultralytics trainer, not Linear"):
        AmpCheck().attach(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="takes fail_on or a checker, not both"):
        AmpCheck(fail_on="error", checker=AmpChecker())
    with pytest.raises(TypeError, match="watch"):
        AmpCheck(watch=2)  # type: ignore[call-arg]


def test_a_model_trains_again_and_reports_again(train: Any, data: Path, tmp_path: Path, log: list[str]) -> None:
    check = AmpCheck()
    model = train(check.attach)
    check.attach(model)
    first = [line.split(": ")[0].split(" · ")[0] for line in said(log)]
    log.clear()
    model.train(data=str(data), project=str(tmp_path / "runs"), **QUIET)
    assert [line.split(": ")[0].split(" · ")[0] for line in said(log)] == first
    assert (model.trainer.save_dir / "ampcheck.json").exists()


def test_a_trainer_can_be_attached_to(data: Path, tmp_path: Path) -> None:
    checker = on_any_cpu()
    overrides = {**QUIET, "model": str(detector(tmp_path)), "data": str(data), "project": str(tmp_path)}
    AmpCheck(checker=checker).attach(DetectionTrainer(overrides=overrides)).train()
    assert codes(checker) == ["AMP101"]


def test_an_attached_model_can_be_copied_and_pickled(tmp_path: Path) -> None:
    model = AmpCheck().attach(YOLO(detector(tmp_path)))
    copied = copy.deepcopy(model)
    assert copied.train.args[0] is copied
    assert copied.train.args[1].__self__ is copied


def test_callbacks_survive_the_launch_of_several_processes(train: Any, tmp_path: Path) -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    model = YOLO(detector(tmp_path))
    AmpCheck(fail_on="error").attach(model)
    sent = pickle.loads(cloudpickle.dumps(dict(model.callbacks)))

    def attach(other: YOLO) -> None:
        for event, function in ours(sent).items():
            other.add_callback(event, function[0])

    train(attach)
    with pytest.raises(FindingsError):
        train(attach, amp="fp16")


def test_without_a_teardown_after_failures_only_what_is_guarded_is_watched(
    train: Any, data: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tear_down(trainer: BaseTrainer) -> None:
        trainer.run_callbacks("teardown")

    def train_of_older_versions(self: BaseTrainer) -> None:
        self._do_train()
        tear_down(self)

    def stop(trainer: Any) -> None:
        raise LookupError

    monkeypatch.setattr(BaseTrainer, "train", train_of_older_versions)
    before = global_state()
    for path, watched in (("attach", True), ("callbacks", False)):
        checker = AmpChecker()
        model = train(functools.partial(connect, AmpCheck(checker=checker), path))
        assert (checker.report.trace.training is not None) is watched
        assert ours(model.trainer.callbacks) == ours(model.callbacks)
        model.add_callback("on_train_batch_end", stop)
        with pytest.raises(LookupError):
            model.train(data=str(data), project=str(tmp_path), **QUIET)
        assert global_state() == before
    assert sum("runs no callback after a failure" in line for line in log) == 2
