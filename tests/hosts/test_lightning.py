"""The Lightning callback, in real trainers on real digits."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_digits import (
    bfloat16,
    digits_module,
    installed,
    loader,
    misspelled,
    misspelled_from_the_third_call,
    off,
    trainer,
)
from torch import nn
from torch.nn.modules import module as module_hooks

import ampcheck.integrations
from ampcheck import RULES, AmpChecker, FindingsError

INSTALLED = installed()
if not INSTALLED:
    pytest.skip("neither of Lightning's packages is installed", allow_module_level=True)

from ampcheck.integrations.lightning import FIXES, AmpCheck  # noqa: E402

lightning = INSTALLED[0]
PACKAGES = [pytest.param(package, id=package.__name__.partition(".")[0]) for package in INSTALLED]
ROOT = Path(__file__).parents[2]
INTEGRATIONS = os.path.dirname(ampcheck.integrations.__file__)
HARDWARE = "AMP107"
"""Whether bfloat16 is emulated is the machine's matter, not the run's."""

MixedPrecision = lightning.plugins.MixedPrecision


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What AmpCheck said through Lightning's loggers."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    handler.addFilter(lambda record: record.funcName == "_say" or "ampcheck" in record.getMessage().lower())
    loggers = [logging.getLogger(package.__name__) for package in INSTALLED]
    for logger in loggers:
        logger.addHandler(handler)
    yield said
    for logger in loggers:
        logger.removeHandler(handler)


def check(**options: Any) -> AmpCheck:
    return AmpCheck(ignore=HARDWARE, **options)


def fp16() -> Any:
    """``16-mixed`` as on a GPU; ``Trainer(precision="16-mixed")`` would turn it into ``bf16-mixed`` on a CPU."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def fit(module: Any, callback: AmpCheck | None, *, val: bool = True, package: Any = lightning, **options: Any) -> Any:
    run = trainer(package, *([callback] if callback else []), **options)
    run.fit(module, loader(), loader("val", 32) if val else None)
    return run


def findings(callback: AmpCheck) -> dict[str, Any]:
    report = callback.checker.report
    assert report is not None
    return {finding.code: finding for finding in report.findings}


def written(directory: Path | str = ".") -> dict[str, Any]:
    return json.loads((Path(directory) / "ampcheck.json").read_text())


# Healthy runs


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("precision", "first", "calls"),
    [
        ("bf16-mixed", "mixed bfloat16 on cpu, loss scaling off", "7 under autocast bfloat16"),
        ("32-true", "true float32 on cpu", "none under autocast"),
    ],
)
def test_healthy_run(package: Any, precision: str, first: str, calls: str, lines: list[str], tmp_path: Path) -> None:
    callback = check()
    run = fit(digits_module(package), callback, package=package, precision=precision)
    assert run.state.finished
    assert lines[0] == f"ampcheck  {first} · 3.0 k parameters float32 · 8 modules · no findings"
    assert f"ampcheck  watched evaluation step · 7 module calls, {calls} · no findings" in lines
    assert f"ampcheck  watched training step · 7 module calls, {calls} · no findings" in lines
    report = written(tmp_path)
    assert report["findings"] == []
    assert report["host"] == {"name": "lightning", "version": package.__version__}
    assert report["precision"]["source"].startswith(f"Trainer(precision='{precision}')")


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_healthy_timm_model(precision: str) -> None:
    timm = pytest.importorskip("timm")
    callback = check()
    net = timm.create_model("resnet10t", num_classes=10)
    fit(digits_module(lightning, net, size=32), callback, precision=precision, limit_train_batches=2)
    assert findings(callback) == {}
    assert callback.checker.report.trace.training is not None


def test_healthy_float16_with_scaler(lines: list[str]) -> None:
    callback = check()
    fit(digits_module(lightning), callback, plugins=[fp16()])
    assert findings(callback) == {}
    assert lines[0].startswith("ampcheck  mixed float16 on cpu, loss scaling on · ")


def test_healthy_manual_optimization() -> None:
    callback = check()
    fit(digits_module(lightning, manual=True), callback, precision="bf16-mixed")
    assert findings(callback) == {}
    assert callback.checker.report.trace.training.calls


# What the trainer declares


@pytest.mark.parametrize(
    ("options", "declared"),
    [
        ({"precision": "16-true"}, ("true", "float16", None, "Trainer(precision='16-true')")),
        ({"precision": "bf16-true"}, ("true", "bfloat16", None, "Trainer(precision='bf16-true')")),
        ({"precision": "64-true"}, ("true", "float64", None, "Trainer(precision='64-true')")),
        ({"precision": "bf16"}, ("mixed", "bfloat16", False, "Trainer(precision='bf16-mixed')")),
        ({"plugins": [fp16()]}, ("mixed", "float16", True, "Trainer(plugins=[MixedPrecision('16-mixed')])")),
        (
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))]},
            ("mixed", "float16", False, "Trainer(plugins=[MixedPrecision('16-mixed')])"),
        ),
        # Lightning replaces the one by the other before any callback is asked, and keeps no trace of it.
        (
            {"precision": "16-mixed"},
            ("mixed", "bfloat16", False, "Trainer(precision='bf16-mixed') (on a CPU Lightning makes the same of"),
        ),
    ],
)
def test_declared_precision(options: dict[str, Any], declared: tuple[Any, ...]) -> None:
    mode, dtype, scaler, source = declared
    fit(digits_module(lightning, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), check(), **options)
    precision = written()["precision"]
    assert (precision["mode"], precision["dtype"], precision["scaler"]) == (mode, dtype, scaler)
    assert precision["device_type"] == "cpu"
    assert precision["source"].startswith(source)


def test_plugin_of_an_unknown_kind_declares_nothing() -> None:
    class Fp8(lightning.plugins.Precision):
        precision = "transformer-engine"

    callback = check()
    fit(digits_module(lightning), callback, plugins=[Fp8()])
    assert written()["precision"]["mode"] == "unknown"


# Faults


class Forgetful(MixedPrecision):
    """A precision plugin whose author forgot to enter autocast."""

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


def half() -> Any:
    module = digits_module(lightning)
    module.net.half()
    return module


def test_autocast_never_entered(lines: list[str]) -> None:
    callback = check()
    fit(digits_module(lightning), callback, plugins=[Forgetful("bf16-mixed", "cpu")])
    finding = findings(callback)["AMP101"]
    assert str(finding.severity) == "error"
    assert finding.host_fix == FIXES["AMP101"]
    said = [line for line in lines if line.startswith("error[AMP101]")]
    assert len(said) == 1
    assert FIXES["AMP101"] in said[0]


def test_autocast_turned_off_by_the_module() -> None:
    callback = check()
    fit(digits_module(lightning, training=off, evaluation=off), callback, precision="bf16-mixed")
    finding = findings(callback)["AMP101"]
    assert "with region():" in {site.code for site in finding.sites}


def test_another_dtype_than_asked() -> None:
    callback = check()
    fit(digits_module(lightning, training=bfloat16, evaluation=bfloat16), callback, plugins=[fp16()])
    finding = findings(callback)["AMP104"]
    assert str(finding.severity) == "error"
    assert finding.evidence["asked"] == "float16"
    assert finding.evidence["in_force"] == "bfloat16"


def test_training_and_evaluation_differ() -> None:
    callback = check()
    fit(digits_module(lightning, evaluation=off), callback, precision="bf16-mixed")
    finding = findings(callback)["AMP105"]
    assert finding.evidence["training"] == "bfloat16"
    assert finding.evidence["evaluation"] == "float32"
    assert finding.host_fix == FIXES["AMP105"]


def test_half_model_before_a_mixed_fit() -> None:
    callback = check()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients") as raised:
        fit(half(), callback, plugins=[fp16()])
    assert raised.value.args == ("Attempting to unscale FP16 gradients.",)
    finding = findings(callback)["AMP201"]
    assert str(finding.severity) == "error"
    assert "net.0.weight" in finding.evidence["parameters"]
    assert written()["failure"]["phase"] == "unscale"


def test_module_halved_in_its_own_fit_start() -> None:
    module = digits_module(lightning)
    module.on_fit_start = module.net.half
    callback = check()
    with pytest.raises(ValueError, match="unscale FP16"):
        fit(module, callback, plugins=[fp16()], val=False)
    assert "AMP201" in findings(callback)


def test_backward_under_manual_optimization_runs_under_autocast() -> None:
    module = digits_module(lightning)
    module.automatic_optimization = False
    loss = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        module.manual_backward(loss(batch, batch_idx))
        module.optimizers().step()

    module.training_step = training_step
    callback = check()
    fit(module, callback, precision="bf16-mixed")
    assert set(findings(callback)) == {"AMP106"}


def test_averaged_copy_in_half_precision() -> None:
    averaging = getattr(lightning.callbacks, "WeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning has no WeightAveraging")
    module = digits_module(lightning, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).bfloat16())
    callback = check()
    run = trainer(lightning, averaging(), callback, precision="bf16-mixed")
    run.fit(module, loader(), loader("val", 32))
    assert sorted(findings(callback)["AMP211"].evidence["parameters"]) == ["net.1.bias", "net.1.weight"]


def test_optimizer_of_another_model() -> None:
    module = digits_module(lightning)
    other = nn.Linear(2, 2)
    module.configure_optimizers = lambda: torch.optim.SGD(other.parameters(), lr=0.1)
    callback = check()
    fit(module, callback)
    assert "AMP309" in findings(callback)


# Crashes


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("options", "phase"),
    [
        ({"training": misspelled}, "forward"),
        ({"training": misspelled_from_the_third_call}, "forward"),
        ({"training": misspelled, "manual": True}, "forward"),
        ({"evaluation": misspelled}, "evaluation_step"),
    ],
    ids=["first-step", "later-step", "manual", "validation"],
)
def test_misspelled_autocast_argument(package: Any, options: dict[str, Any], phase: str) -> None:
    misspelled_from_the_third_call.calls = 0
    module = digits_module(package, **options)
    with pytest.raises(TypeError) as raised:
        fit(module, check(), package=package, precision="bf16-mixed")
    error = raised.value
    assert error is module.raised
    assert error.args == ("autocast.__init__() got an unexpected keyword argument 'device'",)
    assert error.__cause__ is None
    (note,) = error.__notes__
    assert "error[AMP102] autocast-bad-argument" in note
    assert "lightning_digits.py" in note
    assert "Write `torch.autocast(device_type='cpu', dtype=torch.bfloat16)`" in note.replace('"', "'")
    assert FIXES["AMP102"] in note
    assert written()["failure"]["phase"] == phase


def test_crash_that_is_not_ours_is_left_alone() -> None:
    module = digits_module(lightning)
    module.loss = lambda batch, region: {}["missing"]
    with pytest.raises(KeyError) as raised:
        fit(module, check())
    assert not hasattr(raised.value, "__notes__")


def test_crash_is_explained_where_an_earlier_callback_fails_too() -> None:
    class Careless(lightning.Callback):
        def on_exception(self, *args: Any) -> None:
            raise OSError("disk full")

    run = trainer(lightning, Careless(), check())
    module = digits_module(lightning, training=misspelled)
    with pytest.raises(OSError, match="disk full") as raised:
        run.fit(module, loader())
    assert raised.value.__context__ is module.raised
    assert "AMP102" in module.raised.__notes__[0]
    assert footprint(run, module) == footprint(trainer(lightning), module)


# The promises


def state_bytes(module: Any, run: Any) -> dict[str, bytes]:
    def raw(value: Any) -> bytes:
        buffer = io.BytesIO()
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                buffer.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                buffer.write(repr(tensor).encode())
        return buffer.getvalue()

    scaler = getattr(run.precision_plugin, "scaler", None)
    return {
        "losses": raw(module.losses),
        "parameters and buffers": raw(dict(module.state_dict())),
        "optimizer": raw(run.optimizers[0].state_dict()),
        "scaler": raw(scaler.state_dict() if scaler else {}),
        "torch": raw(torch.get_rng_state()),
        "python": repr(random.getstate()).encode(),
    }


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "fp16"])
def test_training_is_bit_identical(precision: str, manual: bool) -> None:
    def trained(callback: AmpCheck | None) -> dict[str, bytes]:
        random.seed(0)
        options = {"plugins": [fp16()]} if precision == "fp16" else {"precision": precision}
        run = trainer(lightning, *([callback] if callback else []), max_steps=20, max_epochs=-1, **options)
        module = digits_module(lightning, manual=manual)
        run.fit(module, loader(count=128), loader("val", 32))
        assert len(module.losses) == 20
        return state_bytes(module, run)

    plain = trained(None)
    assert trained(check(watch_steps=2)) == plain
    assert trained(None) == plain


def footprint(run: Any, module: Any) -> dict[str, Any]:
    """Everything AmpCheck could leave behind."""
    tables = [name for name in vars(module_hooks) if name.startswith("_global_") and name.endswith("_hooks")]
    epoch_loop = run.fit_loop.epoch_loop
    return {
        "global hooks": {name: len(getattr(module_hooks, name)) for name in tables},
        "module hooks": [
            (name, table, len(value))
            for name, part in module.named_modules()
            for table, value in vars(part).items()
            if table.endswith("_hooks") and value
        ],
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "autocast": [getattr(torch.autocast, name).__qualname__ for name in ("__init__", "__enter__", "__exit__")],
        "autocast state": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        # torch 2.4 cannot be asked.
        "saved tensor hooks": getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)(False),
        "attributes": [
            [name for name, value in vars(owner).items() if "ampcheck" in repr(value)]
            for owner in (
                run.strategy,
                run.fit_loop,
                run.validate_loop,
                run.test_loop,
                run.predict_loop,
                epoch_loop,
                epoch_loop.val_loop,
                epoch_loop.automatic_optimization,
                epoch_loop.manual_optimization,
                module,
            )
        ],
        "methods": [
            sorted(set(vars(owner)) & set(dir(type(owner))))
            for owner in (run.strategy, run.fit_loop, epoch_loop, epoch_loop.val_loop)
        ],
    }


def test_footprint_sees_what_is_left_behind() -> None:
    run, module = trainer(lightning), digits_module(lightning)
    clean = footprint(run, module)
    run.strategy.validation_step = run.strategy.validation_step
    assert footprint(run, module) != clean


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({}, {}),
        ({"training": misspelled}, {}),
        ({"evaluation": misspelled}, {}),
        ({"training": off, "evaluation": off}, {"fail_on": "error"}),
    ],
    ids=["fit", "training-crash", "validation-crash", "fail-on"],
)
def test_nothing_stays_behind(module: dict[str, Any], options: dict[str, Any]) -> None:
    lit = digits_module(lightning, **module)
    run = trainer(lightning, check(**options), precision="bf16-mixed")
    clean = footprint(run, lit)
    with contextlib.suppress(TypeError, FindingsError):
        run.fit(lit, loader(), loader("val", 32))
    assert run.state.finished is (not module)
    assert footprint(run, lit) == clean


def test_probes_are_gone_after_the_watched_step() -> None:
    lit = digits_module(lightning)
    seen = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            seen.append(footprint(run, lit))

    run = trainer(lightning, Look(), check(), precision="bf16-mixed")
    run.fit(lit, loader(), loader("val", 32))
    for state in seen:
        del state["methods"], state["attributes"]
    assert all(state == seen[0] for state in seen)
    assert not any(seen[0]["global hooks"].values())
    assert seen[0]["function modes"] == 0


def test_model_can_be_pickled_and_copied_during_the_watch() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    lit = digits_module(lightning, net)
    callback = check()
    copies: list[Any] = []
    plain = lit.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        copies.append((callback.checker.watching, pickle.dumps(net), copy.deepcopy(net), net.state_dict().keys()))
        return plain(batch, batch_idx)

    lit.training_step = training_step
    fit(lit, callback, precision="bf16-mixed")
    assert [watching for watching, *_ in copies] == [True, False, False, False]
    assert len({len(pickled) for _, pickled, _, _ in copies}) == 1
    for _, pickled, copied, keys in copies:
        assert list(keys) == ["1.weight", "1.bias"]
        for twin in (pickle.loads(pickled), copied):
            assert not twin._forward_pre_hooks
            assert not twin._forward_hooks
            twin(torch.zeros(1, 64))


@pytest.mark.parametrize("numerics", ["off", "free"])
def test_steady_state_makes_no_call_of_ours(numerics: str) -> None:
    calls: dict[int, int] = {}
    lit = digits_module(lightning)
    ours = (os.path.dirname(ampcheck.__file__), INTEGRATIONS)

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            calls[len(lit.losses)] = calls.get(len(lit.losses), 0) + 1

    run = trainer(lightning, check(numerics=numerics), precision="bf16-mixed", val_check_interval=2)
    sys.setprofile(profile)
    try:
        run.fit(lit, loader(count=160), loader("val", 32))
    finally:
        sys.setprofile(None)
    assert len(lit.losses) == 10
    assert calls.pop(0) > 0
    assert calls.pop(1) > 0, "the end of the watched step"
    assert calls.pop(10) > 0, "the end of the fit"
    # What is left is not a batch's but a validation's: its start event, which looks at the weights unless numerics are
    # off, and the guard around its loop.
    assert calls.keys() == {2, 4, 6, 8}
    if numerics == "off":
        assert set(calls.values()) == {6}


class Broken(MixedPrecision):
    """A plugin that AmpCheck cannot read."""

    @property
    def scaler(self) -> Any:
        if sys._getframe(1).f_code.co_filename.startswith(INTEGRATIONS):
            raise ZeroDivisionError("of the plugin")
        return None

    @scaler.setter
    def scaler(self, value: Any) -> None:
        pass


def test_fault_of_the_adapter_does_not_stop_the_fit(lines: list[str]) -> None:
    callback = check()
    run = fit(digits_module(lightning), callback, plugins=[Broken("bf16-mixed", "cpu")])
    assert run.state.finished
    assert len(lines) == 1
    assert lines[0].startswith("warning[AMP900] internal-error: AmpCheck switched itself off")
    assert "ZeroDivisionError: of the plugin" in lines[0]
    assert list(findings(callback)) == ["AMP900"]


def test_missing_interface_is_said_in_one_line(lines: list[str]) -> None:
    callback = check()
    run = trainer(lightning, callback, precision="bf16-mixed")
    del run.fit_loop.epoch_loop.manual_optimization
    run.fit(digits_module(lightning), loader())
    assert run.state.finished
    assert lines[0] == (
        "ampcheck  this Lightning has no `trainer.fit_loop.epoch_loop.manual_optimization.run`: it is not watched"
    )
    assert callback.checker.report.trace.training.calls


# Options


def test_fail_on_stops_at_fit_start() -> None:
    module = half()
    callback = check(fail_on="error")
    with pytest.raises(FindingsError, match="AMP201"):
        fit(module, callback, plugins=[fp16()])
    assert module.losses == []


def test_fail_on_stops_after_the_watched_step() -> None:
    module = digits_module(lightning, training=off, evaluation=off)
    with pytest.raises(FindingsError, match="AMP101"):
        fit(module, check(fail_on="error"), precision="bf16-mixed")
    assert len(module.losses) == 1


def test_select_and_ignore() -> None:
    callback = AmpCheck(select=("AMP1",), ignore="AMP101,AMP107")
    fit(digits_module(lightning, training=off), callback, precision="bf16-mixed")
    assert set(findings(callback)) == {"AMP105"}


def test_several_steps_are_watched(lines: list[str]) -> None:
    fit(digits_module(lightning), check(watch_steps=3), precision="bf16-mixed")
    assert "ampcheck  watched 3 training steps · 21 module calls, 21 under autocast bfloat16 · no findings" in lines


def test_own_checker() -> None:
    checker = AmpChecker(ignore=HARDWARE)
    fit(digits_module(lightning), AmpCheck(checker=checker), precision="bf16-mixed")
    assert checker.report is not None
    assert checker.report.trace.training is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"select": "AMP777"}, ValueError, "AMP777"),
        ({"fail_on": "sometimes"}, ValueError, "sometimes"),
        ({"watch_steps": -1}, ValueError, "watch_steps"),
        ({"verbose": True}, TypeError, "verbose"),
        ({"checker": AmpChecker(), "ignore": "AMP1"}, ValueError, "not both"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        AmpCheck(**options)
    assert "\n" not in str(raised.value)


def test_report_goes_where_the_run_writes(tmp_path: Path) -> None:
    fit(digits_module(lightning), check(), logger=lightning.loggers.CSVLogger(tmp_path / "logs"))
    assert written(tmp_path / "logs" / "lightning_logs" / "version_0")["findings"] == []
    fit(digits_module(lightning), check(), default_root_dir=tmp_path / "root")
    assert written(tmp_path / "root")["findings"] == []
    fit(digits_module(lightning), check(report=tmp_path / "mine.json"))
    assert json.loads((tmp_path / "mine.json").read_text())["findings"] == []
    assert not (tmp_path / "ampcheck.json").exists()


@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {}], ids=["fast_dev_run", "report-false"])
def test_no_report_where_none_is_wanted(options: dict[str, Any], tmp_path: Path, lines: list[str]) -> None:
    fit(digits_module(lightning), check(report=bool(options)), **options)
    assert lines
    assert not list(tmp_path.rglob("*.json"))


# Runs of other shapes


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_alone(entry: str, lines: list[str]) -> None:
    callback = check()
    run = trainer(lightning, callback, precision="bf16-mixed")
    getattr(run, entry)(digits_module(lightning), dataloaders=loader("val", 32))
    assert findings(callback) == {}
    assert lines[0].startswith("ampcheck  mixed bfloat16 on cpu")
    assert any(line.startswith("ampcheck  watched evaluation step") for line in lines)
    assert "AMP101" in callback.checker.report.not_judged


def test_evaluation_after_a_fit_keeps_the_report_of_the_fit() -> None:
    callback = check()
    module = digits_module(lightning, training=off)
    run = fit(module, callback, precision="bf16-mixed")
    after_fit = written()
    run.test(module, loader("val", 32), verbose=False)
    assert written() == after_fit
    assert {finding["code"] for finding in after_fit["findings"]} >= {"AMP101", "AMP105"}


def test_crash_in_test_alone() -> None:
    run = trainer(lightning, check())
    with pytest.raises(TypeError) as raised:
        run.test(digits_module(lightning, evaluation=misspelled), loader("val", 32), verbose=False)
    assert "AMP102" in raised.value.__notes__[0]
    assert written()["failure"]["phase"] == "evaluation_step"


def test_empty_loader(lines: list[str]) -> None:
    callback = check()
    run = trainer(lightning, callback, precision="bf16-mixed")
    run.fit(digits_module(lightning), torch.utils.data.DataLoader([], batch_size=2))
    assert findings(callback) == {}
    assert "no training step was watched" in callback.checker.report.not_judged["AMP101"]


def test_module_without_parameters() -> None:
    class Empty(lightning.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    callback = check()
    assert fit(Empty(), callback, val=False, precision="bf16-mixed").state.finished


def test_gradient_accumulation_and_two_fits_with_one_callback(lines: list[str]) -> None:
    callback = check()
    for _ in range(2):
        fit(digits_module(lightning), callback, precision="bf16-mixed", accumulate_grad_batches=2)
    assert sum(line.startswith("ampcheck  watched training step") for line in lines) == 2


def test_resume_from_a_checkpoint_with_a_scaler(tmp_path: Path, lines: list[str]) -> None:
    run = fit(digits_module(lightning), None, plugins=[fp16()])
    run.save_checkpoint(tmp_path / "last.ckpt")
    lines.clear()
    callback = check()
    again = trainer(lightning, callback, plugins=[fp16()], max_epochs=2)
    again.fit(digits_module(lightning), loader(), loader("val", 32), ckpt_path=tmp_path / "last.ckpt")
    assert findings(callback) == {}
    assert sum("loss scaling on" in line for line in lines) == 1


@pytest.mark.parametrize("what", ["module", "submodule"])
def test_compiled(what: str) -> None:
    def trained(callback: AmpCheck | None) -> tuple[int, list[float]]:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        lit = digits_module(lightning)
        if what == "submodule":
            lit.net = torch.compile(lit.net, backend=counter)
        run = trainer(lightning, *([callback] if callback else []), precision="bf16-mixed")
        run.fit(torch.compile(lit, backend=counter) if what == "module" else lit, loader(), loader("val", 32))
        return counter.frame_count, lit.losses

    import torch._dynamo.testing

    callback = check()
    assert trained(callback) == trained(None)
    assert findings(callback) == {}
    assert "AMP110" in callback.checker.report.not_judged


def test_callback_can_be_sent_to_another_process() -> None:
    callback = pickle.loads(pickle.dumps(check(select="AMP1")))
    fit(digits_module(lightning, training=off), callback, precision="bf16-mixed")
    assert set(findings(callback)) == {"AMP101", "AMP105"}
    pickle.dumps(callback.checker)


# Both packages, and each alone


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(str(path) for path in (ROOT / "tests", ROOT / "tests" / "hosts"))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


SCENARIOS = """
import json, os, runpy, sys, traceback
import sklearn.datasets, torch.utils.data

def hide(*packages):
    sys.modules.update(dict.fromkeys(packages))

def example(name):
    runpy.run_path(os.path.join(sys.argv[1], name), run_name="__main__")

def lightning_alone():
    hide("pytorch_lightning")
    example("digits_lightning.py")

def pytorch_lightning_alone():
    hide("lightning", "lightning.pytorch")
    example("wrong_autocast_argument.py")

def neither():
    hide("lightning", "lightning.pytorch", "pytorch_lightning")
    import ampcheck.integrations.lightning

def both():
    from ampcheck.integrations.lightning import AmpCheck
    import lightning.pytorch, pytorch_lightning
    for package in (lightning.pytorch, pytorch_lightning):
        assert issubclass(AmpCheck, package.Callback)
        callback = AmpCheck()
        assert callback in package.Trainer(callbacks=callback, accelerator="cpu", logger=False).callbacks

def first_one():
    import pytorch_lightning
    from ampcheck.integrations.lightning import AmpCheck
    assert issubclass(AmpCheck, pytorch_lightning.Callback)
    assert "lightning.pytorch" not in sys.modules

codes = {}
for scenario in (lightning_alone, pytorch_lightning_alone, neither, both, first_one):
    name = scenario.__name__
    child = os.fork()
    if child == 0:
        code = 0
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), 2)
        try:
            scenario()
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
json.dump(codes, open("codes.json", "w"))
"""


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """By name of the scenario: exit status and standard error. They share one import of torch by forking."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    directory = tmp_path_factory.mktemp("scenarios")
    result = python("-c", SCENARIOS, str(ROOT / "examples"), cwd=directory)
    assert result.returncode == 0, result.stderr
    codes = json.loads((directory / "codes.json").read_text())
    return {name: (code, (directory / name).read_text()) for name, code in codes.items()}


def test_example_on_lightning_alone_shows_its_report_by_default(scenarios: dict[str, tuple[int, str]]) -> None:
    pytest.importorskip("lightning.pytorch")
    code, said = scenarios["lightning_alone"]
    assert code == 0, said
    assert "ampcheck  mixed bfloat16 on cpu, loss scaling off" in said
    assert "ampcheck  watched training step" in said
    assert "error[" not in said


def test_wrong_example_on_pytorch_lightning_alone_is_explained(scenarios: dict[str, tuple[int, str]]) -> None:
    pytest.importorskip("pytorch_lightning")
    code, said = scenarios["pytorch_lightning_alone"]
    assert code == 1
    assert "TypeError: autocast.__init__() got an unexpected keyword argument 'device'" in said
    assert "error[AMP102]" in said


def test_neither_package_is_said_in_one_line(scenarios: dict[str, tuple[int, str]]) -> None:
    code, said = scenarios["neither"]
    assert code == 1
    assert said.splitlines()[-1] == (
        "ImportError: AmpCheck for Lightning can import neither `lightning` nor `pytorch_lightning`"
    )


@pytest.mark.parametrize("name", ["both", "first_one"])
def test_packages_in_use_decide_the_base_class(scenarios: dict[str, tuple[int, str]], name: str) -> None:
    if len(INSTALLED) < 2:
        pytest.skip("one of the two packages is not installed")
    code, said = scenarios[name]
    assert code == 0, said


# Two processes


def on_rank_1(fault: Any, otherwise: Any = contextlib.nullcontext) -> Any:
    return lambda: fault() if torch.distributed.get_rank() == 1 else otherwise()


class ForgetfulOnRank1(MixedPrecision):
    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        with on_rank_1(contextlib.nullcontext, super().forward_context)():
            yield


def two_processes(callback: AmpCheck, plugin: Any = MixedPrecision, **options: Any) -> None:
    run = trainer(lightning, callback, strategy="ddp_fork", devices=2, plugins=[plugin("bf16-mixed", "cpu")])
    run.fit(digits_module(lightning, **options), loader(count=32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ddp_fork forks")
def test_findings_of_both_ranks_are_reported_once(tmp_path: Path) -> None:
    said = tmp_path / "said"
    handler = logging.FileHandler(said)
    logging.getLogger(lightning.__name__).addHandler(handler)
    two_processes(check(), ForgetfulOnRank1)
    logging.getLogger(lightning.__name__).removeHandler(handler)
    (finding,) = written()["findings"]
    assert finding["code"] == "AMP101"
    assert finding["message"].endswith("(seen on rank 1 only)")
    assert said.read_text().count("error[AMP101]") == 1
    assert said.read_text().count("ampcheck  mixed bfloat16 on cpu") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ddp_fork forks")
def test_crash_of_a_forked_rank_is_explained() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as raised:
        two_processes(check(), training=on_rank_1(misspelled))
    assert "TypeError: autocast.__init__() got an unexpected keyword argument 'device'" in str(raised.value)
    if sys.version_info >= (3, 11):
        assert "error[AMP102]" in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ddp_fork forks")
def test_fail_on_stops_every_rank() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="FindingsError"):
        two_processes(check(fail_on="error"), ForgetfulOnRank1)


DYING_RANK = """
import torch, {package} as package
from lightning_digits import bfloat16, digits_module, loader, misspelled, trainer
from ampcheck.integrations.lightning import AmpCheck

def region():
    return misspelled() if torch.distributed.get_rank() == 1 else bfloat16()

if __name__ == "__main__":
    run = trainer(package, AmpCheck(ignore="AMP107"), strategy="ddp", devices=2)
    run.fit(digits_module(package, training=region), loader(count=32))
"""


def test_rank_that_dies_hangs_no_other(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DYING_RANK.replace("{package}", lightning.__name__))
    result = python("train.py", cwd=tmp_path)
    assert result.returncode != 0
    assert "TypeError: autocast.__init__() got an unexpected keyword argument 'device'" in result.stderr
    if sys.version_info >= (3, 11):
        assert "error[AMP102]" in result.stderr


# The words


def test_fixes_are_for_rules_that_exist() -> None:
    assert {code.partition(":")[0] for code in FIXES} <= {rule.code for rule in RULES}
    assert all(text.endswith(".") for text in FIXES.values() if text)
