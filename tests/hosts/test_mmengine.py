"""AmpCheckHook in real Runners that train on scikit-learn's digits."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

import ampcheck
from ampcheck import RULES, AmpChecker, FindingsError

CONFIG = Path(__file__).with_name("mmengine_config.py")
ROOT = CONFIG.parents[2]
EXPERIMENT = itertools.count()

FLOAT32 = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}, "_delete_": True}
BFLOAT16 = {"dtype": "bfloat16", "loss_scale": {"enabled": False, "_delete_": True}}
# Whether this machine computes natively in a dtype is not what these tests are about.
QUIET = {"custom_hooks": [{"type": "AmpCheckHook", "ignore": "AMP107"}]}

Build = Callable[..., Runner]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(*hooks: Hook, **options: Any) -> Runner:
        config = Config.fromfile(CONFIG)
        number = next(EXPERIMENT)
        config.work_dir = str(tmp_path / f"run{number}")
        config.experiment_name = f"digits{number}"
        config.merge_from_dict(copy.deepcopy(options))
        runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
        for hook in hooks:
            runner.register_hook(hook)
        return runner

    return build


def log_of(runner: Runner) -> str:
    return "".join(path.read_text() for path in Path(runner.log_dir).glob("*.log"))


def lines_of(runner: Runner) -> list[str]:
    """What AmpCheck said in one line each."""
    return [line.partition("ampcheck  ")[2] for line in log_of(runner).splitlines() if "ampcheck  " in line]


def report_of(runner: Runner) -> dict[str, Any]:
    return json.loads((Path(runner.log_dir) / "ampcheck.json").read_text())


def findings_of(runner: Runner) -> dict[str, dict[str, Any]]:
    return {finding["code"]: finding for finding in report_of(runner)["findings"]}


def note_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


class Look(Hook):
    """Keeps the losses, and calls ``look(runner, batch_idx)`` after each training iteration."""

    def __init__(self, look: Callable[[Runner, int], None] | None = None) -> None:
        self.look = look
        self.losses: list[Tensor] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        if self.look is not None:
            self.look(runner, batch_idx)


@pytest.mark.parametrize(
    ("optim_wrapper", "said"),
    [
        (BFLOAT16, f"mixed bfloat16 on {get_device()}, loss scaling off"),
        ({}, f"mixed float16 on {get_device()}, loss scaling on"),
        (FLOAT32, f"true float32 on {get_device()}"),
    ],
)
def test_healthy_run(build: Build, optim_wrapper: dict[str, Any], said: str) -> None:
    runner = build(optim_wrapper=optim_wrapper, **QUIET)
    runner.train()
    fit, training, *_ = lines_of(runner)
    assert fit.startswith(said)
    assert fit.endswith("no findings")
    assert training.startswith("watched training step")
    assert training.endswith("no findings")
    # Evaluating without autocast is MMEngine's default: information where training is under autocast.
    severities = {code: finding["severity"] for code, finding in findings_of(runner).items()}
    assert severities == ({} if optim_wrapper is FLOAT32 else {"AMP105": "info"})
    assert runner.message_hub.get_scalar("val/accuracy").current() > 0.5


def test_json_report(build: Build) -> None:
    runner = build(**QUIET)
    runner.train()
    report = report_of(runner)
    assert report["schema"] == "ampcheck/1"
    assert report["host"]["name"] == "mmengine"
    assert report["precision"] == {
        "mode": "mixed",
        "device_type": get_device(),
        "dtype": "float16",
        "scaler": True,
        "source": "optim_wrapper.type='AnyDeviceAmpOptimWrapper', dtype='float16'",
    }
    modules = {module["name"]: module for module in report["modules"]}
    assert modules["head"]["autocast"] == "float16"
    assert modules["head"]["outputs"] == ["float16"]


def test_evaluation_under_the_same_autocast_is_no_finding(build: Build) -> None:
    default = str(torch.get_autocast_dtype(get_device())).removeprefix("torch.")
    runner = build(optim_wrapper={"dtype": default}, val_cfg={"fp16": True}, **QUIET)
    runner.train()
    assert "AMP105" not in findings_of(runner)
    assert runner.val_loop.fp16


def test_evaluation_in_another_dtype_than_asked_is_a_warning(build: Build) -> None:
    other = "float16" if torch.get_autocast_dtype(get_device()) is torch.bfloat16 else "bfloat16"
    runner = build(optim_wrapper={"dtype": other}, val_cfg={"fp16": True}, **QUIET)
    runner.train()
    finding = findings_of(runner)["AMP105"]
    assert finding["severity"] == "warning"
    assert finding["host_fix"].startswith("Remove `fp16=True` from `val_cfg`")


def test_legacy_fp16_is_read_by_nothing(build: Build) -> None:
    runner = build(optim_wrapper=FLOAT32, fp16={"loss_scale": 512.0})
    runner.train()
    finding = findings_of(runner)["AMP101"]
    assert finding["severity"] == "error"
    assert "fp16=dict(loss_scale=512.0)" in finding["message"]
    assert "`type='AmpOptimWrapper'` in `optim_wrapper`" in finding["host_fix"]
    assert "error[AMP101]" in log_of(runner)


def test_legacy_fp16_beside_an_amp_wrapper_is_harmless(build: Build) -> None:
    runner = build(fp16={"loss_scale": 512.0}, **QUIET)
    runner.train()
    assert "AMP101" not in findings_of(runner)


def test_autocast_never_entered(build: Build) -> None:
    runner = build(optim_wrapper={"type": "IdleAmpOptimWrapper"})
    runner.train()
    finding = findings_of(runner)["AMP101"]
    assert finding["severity"] == "error"
    assert "optim_wrapper.type='IdleAmpOptimWrapper', dtype='float16'" in finding["message"]


def test_effective_dtype_differs(build: Build) -> None:
    runner = build(optim_wrapper={"type": "OtherDtypeAmpOptimWrapper"})
    runner.train()
    finding = findings_of(runner)["AMP104"]
    assert finding["severity"] == "error"
    assert finding["evidence"]["asked"] == "float16"
    assert finding["evidence"]["in_force"] == "bfloat16"
    assert finding["host_fix"].startswith("Set `dtype='float16'` or `dtype='bfloat16'` in `optim_wrapper`")


def test_half_parameters_under_mixed_precision(build: Build) -> None:
    runner = build(model={"type": "HalfDigitsNet"})
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        runner.train()
    finding = findings_of(runner)["AMP201"]
    assert finding["severity"] == "error"
    assert "head.weight" in finding["evidence"]["parameters"]
    assert finding["host_fix"].startswith("Keep the model in float32 when you build the ")
    # Said at fit start, before the step that dies of it.
    assert "error[AMP201]" in log_of(runner)


def test_averaged_copy_is_looked_at(build: Build) -> None:
    hooks = [{"type": "AmpCheckHook"}, {"type": "EMAHook"}]
    runner = build(
        model={"type": "HalfDigitsNet"}, optim_wrapper={"loss_scale": {"enabled": False}}, custom_hooks=hooks
    )
    runner.train()
    assert findings_of(runner)["AMP211"]["severity"] == "warning"
    runner = build(custom_hooks=hooks)
    runner.train()
    report = report_of(runner)
    assert "AMP211" not in {finding["code"] for finding in report["findings"]}
    assert "AMP211" not in {entry["code"] for entry in report["not_judged"]}


@pytest.mark.parametrize(("model", "step"), [("MistypedDigitsNet", 0), ("LateMistypedDigitsNet", 4)])
def test_mistyped_autocast_is_explained(build: Build, model: str, step: int) -> None:
    """In the watched step, and long after the watch has ended."""
    runner = build(model={"type": model})
    with pytest.raises(TypeError) as caught:
        runner.train()
    assert caught.value is runner.model.raised
    assert caught.value.args == ("autocast.__init__() got an unexpected keyword argument 'device'",)
    assert caught.value.__cause__ is None
    assert "AMP102" in note_of(caught.value)
    assert "torch.autocast(device=logits.device.type" in note_of(caught.value)
    report = report_of(runner)
    (finding,) = [finding for finding in report["findings"] if finding["code"] == "AMP102"]
    assert finding["sites"][0]["file"].endswith("mmengine_digits.py")
    assert report["failure"]["type"] == "TypeError"
    assert report["failure"]["step"] == step


def test_failure_in_a_hook_of_the_users(build: Build) -> None:
    """`call_hook` raises a hook's TypeError again as a new one, `from None`."""

    def look(runner: Runner, batch_idx: int) -> None:
        if batch_idx == 3:
            torch.autocast(device="cpu")

    runner = build(Look(look))
    with pytest.raises(TypeError) as caught:
        runner.train()
    assert 'torch.autocast(device="cpu")' in note_of(caught.value)
    assert report_of(runner)["failure"]["step"] == 3


def test_failure_in_evaluation_of_another_kind_gets_no_note(build: Build) -> None:
    runner = build(model={"type": "FailingEvaluationNet"})
    with pytest.raises(LookupError) as caught:
        runner.train()
    assert caught.value.args == ("no such class",)
    assert note_of(caught.value) == ""
    assert report_of(runner)["failure"]["phase"] == "evaluation_step"


def trained(build: Build, hooks: list[dict[str, Any]], **options: Any) -> tuple[list[bytes], Runner]:
    """Everything that 20 steps and an evaluation leave, as bytes."""
    look = Look()
    runner = build(look, custom_hooks=hooks, **options)
    runner.train()
    momenta = [state["momentum_buffer"] for state in runner.optim_wrapper.optimizer.state.values()]
    tensors = [*look.losses, *runner.model.state_dict().values(), *momenta, torch.get_rng_state()]
    bits = [torch.atleast_1d(tensor).cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    others = (runner.optim_wrapper.loss_scaler.state_dict(), random.getstate(), np.random.get_state()[1].tolist())
    gradients = [parameter.grad is None for parameter in runner.model.parameters()]
    assert len(look.losses) == 20
    return [*bits, repr(others).encode(), repr(gradients).encode()], runner


def test_training_is_bit_identical(build: Build) -> None:
    plain, _ = trained(build, [])
    checked, runner = trained(build, [{"type": "AmpCheckHook"}])
    assert checked == plain
    assert lines_of(runner)
    other, _ = trained(build, [], randomness={"seed": 1})
    assert other != plain


def state_of_torch() -> dict[str, Any]:
    """What a watch might leave in PyTorch: global hooks, modes, patched methods, autocast."""
    module = torch.nn.modules.module
    tables = {name: len(table) for name, table in vars(module).items() if name.startswith("_global_") and table}
    methods = {name: vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__")}
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return {"tables": tables, "methods": methods, "modes": modes, "autocast": torch.is_autocast_enabled(get_device())}


def attributes_of(runner: Runner) -> list[set[str]]:
    loops = (runner._train_loop, runner._val_loop, runner._test_loop)
    owners = [*runner.model.modules(), *(loop for loop in loops if hasattr(loop, "run"))]
    return [{name for name, value in vars(owner).items() if callable(value)} for owner in owners]


def hook_tables_of(model: nn.Module) -> int:
    return sum(len(table) for module in model.modules() for name, table in vars(module).items() if "_hooks" in name)


@pytest.mark.parametrize(
    ("model", "error"),
    [("DigitsNet", None), ("MistypedDigitsNet", TypeError), ("FailingEvaluationNet", LookupError)],
)
def test_nothing_stays_behind(build: Build, model: str, error: type[Exception] | None) -> None:
    before = state_of_torch()
    runner = build(model={"type": model}, custom_hooks=[{"type": "AmpCheckHook"}])
    tables = hook_tables_of(runner.model)
    plain = build(model={"type": model}, custom_hooks=[])
    for each in (plain, runner):
        if error is None:
            each.train()
        else:
            with pytest.raises(error):
                each.train()
    assert state_of_torch() == before
    assert attributes_of(runner) == attributes_of(plain)
    assert hook_tables_of(runner.model) == tables


def test_model_can_be_copied_and_pickled_during_the_watch(build: Build) -> None:
    seen: list[tuple[bool, str]] = []
    original = torch.autocast.__enter__.__code__

    def look(runner: Runner, batch_idx: int) -> None:
        copies = [copy.deepcopy(runner.model), pickle.loads(pickle.dumps(runner.model))]
        for other in copies:
            assert hook_tables_of(other) == hook_tables_of(runner.model)
            assert vars(other).keys() == vars(runner.model).keys()
            assert other.state_dict().keys() == runner.model.state_dict().keys()
        seen.append((torch.autocast.__enter__.__code__ is not original, type(copies[0]).__name__))

    runner = build(Look(look))
    runner.train()
    # Watched in the first iteration and in no other.
    assert seen == [(True, "DigitsNet")] + [(False, "DigitsNet")] * 19


def test_nothing_of_ours_runs_in_steady_state(build: Build) -> None:
    packages = [*ampcheck.__path__, str(ROOT / "integrations")]
    ours = tuple(str(Path(path).resolve()) + os.sep for path in packages)
    calls: dict[int, int] = {}

    def look(runner: Runner, batch_idx: int) -> None:
        def count(frame: Any, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(ours):
                calls[batch_idx] = calls.get(batch_idx, 0) + 1

        calls[batch_idx] = 0
        sys.setprofile(count if batch_idx < 18 else None)

    runner = build(Look(look))
    try:
        runner.train()
    finally:
        sys.setprofile(None)
    # The entry of the first iteration counts what ends its watch.
    assert calls.pop(0) > 0
    assert len(calls) == 19
    assert not any(calls.values())


def test_validation_alone(build: Build) -> None:
    runner = build(val_cfg={"fp16": True})
    before = state_of_torch()
    runner.val()
    fit, evaluation, *_ = lines_of(runner)
    assert fit.endswith("no findings")
    assert evaluation.startswith("watched evaluation step")
    assert evaluation.endswith("no findings")
    assert report_of(runner)["precision"]["source"] == "val_cfg.fp16=True"
    assert state_of_torch() == before
    assert not {"run", "run_iter"} & set(vars(runner.val_loop))


def test_train_then_test_with_the_same_runner(build: Build) -> None:
    runner = build(**QUIET)
    runner.train()
    said = len(lines_of(runner))
    runner.test()
    assert len(lines_of(runner)) > said
    assert not {"run", "run_iter"} & set(vars(runner.test_loop))


def test_iteration_based_loop(build: Build) -> None:
    loop = {"type": "IterBasedTrainLoop", "max_iters": 12, "val_interval": 6, "_delete_": True}
    runner = build(optim_wrapper=BFLOAT16, train_cfg=loop, **QUIET)
    runner.train()
    assert [line.split(" · ")[0] for line in lines_of(runner)[1:3]] == [
        "watched training step",
        "watched evaluation step",
    ]
    runner = build(model={"type": "LateMistypedDigitsNet"}, train_cfg=loop)
    with pytest.raises(TypeError) as caught:
        runner.train()
    assert "AMP102" in note_of(caught.value)


def test_flexible_runner(build: Build) -> None:
    options = {"runner_type": "FlexibleRunner", "strategy": {"type": "SingleDeviceStrategy"}, "env_cfg": {}}
    runner = build(**options, **QUIET)
    runner.train()
    assert lines_of(runner)[1].endswith("no findings")
    assert findings_of(runner).keys() == {"AMP105"}
    runner = build(model={"type": "MistypedDigitsNet"}, **options)
    with pytest.raises(TypeError) as caught:
        runner.train()
    assert "AMP102" in note_of(caught.value)


def test_several_optimizer_wrappers(build: Build) -> None:
    options = {"model": {"type": "TwoPartDigitsNet"}}
    optim_wrapper = {"constructor": "TwoPartConstructor", "dtype": "bfloat16", "loss_scale": {"enabled": False}}
    runner = build(optim_wrapper=optim_wrapper, **options, **QUIET)
    runner.train()
    precision = report_of(runner)["precision"]
    assert (precision["mode"], precision["dtype"]) == ("mixed", "bfloat16")
    assert "optim_wrapper.backbone.type='AnyDeviceAmpOptimWrapper', dtype='bfloat16'" in precision["source"]
    assert findings_of(runner).keys() == {"AMP105"}
    runner = build(optim_wrapper=optim_wrapper | {"type": "IdleAmpOptimWrapper"}, **options)
    runner.train()
    assert findings_of(runner)["AMP101"]["severity"] == "error"


def test_compiled_train_step_is_not_watched_and_not_changed(build: Build) -> None:
    def losses(hooks: list[dict[str, Any]]) -> tuple[list[bytes], int, Runner]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        bits, runner = trained(build, hooks, compile={"backend": "eager"})
        return bits, sum(torch._dynamo.utils.counters["frames"].values()), runner

    plain, frames, _ = losses([])
    checked, frames_checked, runner = losses([{"type": "AmpCheckHook"}])
    assert frames > 0
    assert (checked, frames_checked) == (plain, frames)
    assert "the steps are not watched: the model is compiled (`compile` in the config)" in lines_of(runner)
    assert "AMP101" in {entry["code"] for entry in report_of(runner)["not_judged"]}
    assert not {"run", "run_iter"} & (set(vars(runner.train_loop)) | set(vars(runner.val_loop)))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"model": {"type": "HalfDigitsNet"}}, "AMP201"),
        ({"optim_wrapper": {"type": "IdleAmpOptimWrapper"}}, "AMP101"),
    ],
)
def test_fail_on_stops_the_run(build: Build, options: dict[str, Any], code: str) -> None:
    """At fit start, and where the watched step ends."""
    runner = build(custom_hooks=[{"type": "AmpCheckHook", "fail_on": "error"}], **options)
    before = state_of_torch()
    with pytest.raises(FindingsError, match=code):
        runner.train()
    assert runner.iter < 2
    assert state_of_torch() == before
    assert not {"run", "run_iter"} & set(vars(runner.train_loop))


def test_select_and_ignore(build: Build) -> None:
    idle = {"optim_wrapper": {"type": "IdleAmpOptimWrapper"}}
    runner = build(custom_hooks=[{"type": "AmpCheckHook", "select": ["AMP2"]}], **idle)
    runner.train()
    assert findings_of(runner) == {}
    runner = build(custom_hooks=[{"type": "AmpCheckHook", "ignore": "AMP101"}], **idle)
    runner.train()
    assert "AMP101" not in findings_of(runner)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": "AMP999"}, ValueError, "AMP999"),
        ({"fail_on": "fatal"}, ValueError, "fail_on must be"),
        ({"watch_steps": -1}, ValueError, "watch_steps"),
        ({"selct": "AMP1"}, TypeError, "selct"),
        ({"select": "AMP1", "checker": "mine"}, ValueError, "either `checker` or options"),
    ],
)
def test_bad_option(build: Build, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        build(custom_hooks=[{"type": "AmpCheckHook", **options}])
    assert "\n" not in str(caught.value)


def test_report_option_and_checker(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "report.json"
    runner = build(custom_hooks=[{"type": "AmpCheckHook", "report": str(path)}])
    runner.train()
    assert json.loads(path.read_text())["schema"] == "ampcheck/1"
    assert not (Path(runner.log_dir) / "ampcheck.json").exists()
    checker = AmpChecker(report=False)
    runner = build(HOOKS.get("AmpCheckHook")(checker=checker), custom_hooks=[])
    runner.train()
    assert checker.report is not None
    assert not (Path(runner.log_dir) / "ampcheck.json").exists()


def test_watch_steps(build: Build) -> None:
    runner = build(custom_hooks=[{"type": "AmpCheckHook", "watch_steps": 3}])
    runner.train()
    assert lines_of(runner)[1].startswith("watched 3 training steps")


def test_fault_of_ours_leaves_the_run_alone(build: Build) -> None:
    runner = build(optim_wrapper={"type": "SecretiveAmpOptimWrapper"})
    runner.train()
    assert runner.iter == 20
    log = log_of(runner)
    assert log.count("AmpCheck switched itself off") == 1
    assert "RuntimeError: not yours" in log


def test_last_of_all_hooks(build: Build) -> None:
    runner = build(custom_hooks=[{"type": "AmpCheckHook"}, {"type": "EMAHook"}])
    assert type(runner.hooks[-1]).__name__ == "AmpCheckHook"


def test_dotted_type_and_second_import(tmp_path: Path) -> None:
    """Without ``custom_imports``; and after another import of the module, as notebooks do it."""
    script = f"""
import importlib, sys
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
config = Config.fromfile({str(CONFIG)!r}, import_custom_modules=False)
import hosts.mmengine_digits
assert "AmpCheckHook" not in HOOKS.module_dict
config.custom_hooks = [dict(type="ampcheck.integrations.mmengine.AmpCheckHook")]
config.work_dir = {str(tmp_path)!r}
Runner.from_cfg(config).train()
del sys.modules["ampcheck.integrations.mmengine"]
importlib.import_module("ampcheck.integrations.mmengine")
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "watched training step" in done.stdout


def test_fixes_are_for_known_rules() -> None:
    fixes = sys.modules[HOOKS.get("AmpCheckHook").__module__].FIXES
    assert {code.partition(":")[0] for code in fixes} <= {rule.code for rule in RULES}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


def two_processes(directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str, dict[str, Any]]:
    """The launcher's output, the log of the first process and the report."""
    script = str(CONFIG.with_name("mmengine_two_processes.py"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(directory))
    done = python(*launch, *arguments, CUDA_VISIBLE_DEVICES="-1")
    (log,) = directory.glob("*/*.log")
    return done, log.read_text(), json.loads((log.parent / "ampcheck.json").read_text())


def test_finding_of_one_of_two_processes_is_reported_once(tmp_path: Path) -> None:
    done, log, report = two_processes(tmp_path, "error", "optim_wrapper.type", "IdleAmpOptimWrapper")
    assert done.returncode == 1
    assert done.stdout.count("watched training step") == log.count("watched training step") == 1
    assert done.stdout.count("error[AMP101]") == log.count("error[AMP101]") == 1
    (finding,) = [finding for finding in report["findings"] if finding["code"] == "AMP101"]
    assert finding["message"].endswith("(seen on rank 1 only)")
    # Both processes are stopped by it.
    for rank in (0, 1):
        assert f"[rank{rank}]: ampcheck.checker.FindingsError: error[AMP101]" in done.stderr
    # The wrapper of data parallelism is no part of the names.
    assert {module["name"] for module in report["modules"]} >= {"head", "backbone.0"}


def test_failure_of_one_of_two_processes_hangs_nobody(tmp_path: Path) -> None:
    done, log, report = two_processes(tmp_path, "never", "model.type", "LateMistypedDigitsNet")
    assert done.returncode == 1
    assert log.count("watched training step") == 1
    assert "[rank1]: error[AMP102]" in done.stderr
    assert "[rank0]: error[AMP102]" not in done.stderr
    assert report["findings"] == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_amp_optim_wrapper_on_cuda(build: Build, dtype: str | None) -> None:
    optim_wrapper = {"type": "AmpOptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}, "_delete_": True}
    runner = build(optim_wrapper=optim_wrapper | ({"dtype": dtype} if dtype else {}))
    runner.train()
    assert lines_of(runner)[0].startswith(f"mixed {dtype or 'float16'} on cuda, loss scaling on")
    # MMEngine makes its scaler whatever the dtype.
    assert findings_of(runner).keys() == ({"AMP105", "AMP302"} if dtype else {"AMP105"})


@pytest.mark.parametrize(
    ("script", "said"),
    [("digits_mmengine.py", "no findings"), ("wrong_legacy_fp16.py", "error[AMP101] autocast-not-active")],
)
def test_example(tmp_path: Path, script: str, said: str) -> None:
    done = python(str(ROOT / "examples" / script), "--work-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
