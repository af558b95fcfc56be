"""Reported crashes over dtypes, autocast arguments and loss scaling, each in the host it was reported from, and the
same run after the printed fix."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ampcheck import AmpChecker, Finding
from ampcheck.trace import Failure, Site

HERE = Path(__file__).resolve()
EXPERIMENT = itertools.count()


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


class Guarded(nn.Module):
    """Runs ``fault`` from the ``since``-th training call on, and ``sound`` in every other; keeps what was raised."""

    def __init__(self, since: int = 0) -> None:
        super().__init__()
        self.since = since
        self.calls = 0
        self.raised: list[BaseException] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A replay of the crash calls the module once more.
        if not (self.training and torch.is_grad_enabled()):
            return self.sound(x)
        self.calls += 1
        if self.calls <= self.since:
            return self.sound(x)
        try:
            return self.fault(x)
        except Exception as error:
            self.raised.append(error)
            raise

    def sound(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def fault(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def checker() -> AmpChecker:
    # Whether this machine computes natively in a dtype is not what these tests are about.
    return AmpChecker(ignore="AMP107")


def findings(checker: AmpChecker) -> dict[str, Finding]:
    assert checker.report is not None
    assert checker.report.trace.internal_error is None, checker.report.trace.internal_error
    assert len({one.code for one in checker.report.findings}) == len(checker.report.findings)
    return {one.code: one for one in checker.report.findings}


def failure(checker: AmpChecker) -> Failure:
    assert checker.report is not None
    assert checker.report.trace.failure is not None
    return checker.report.trace.failure


def lines(finding: Finding, role: str) -> list[str]:
    """The marks of the lines of this file that the finding gives the ``role``."""
    return [_mark(site) for site in finding.sites if site.role == role]


def _mark(site: Site) -> str:
    if Path(site.file) != HERE:
        return f"{Path(site.file).name}: {site.code}"
    return HERE.read_text(encoding="utf-8").splitlines()[site.line - 1].partition("# <- ")[2]


def operands(finding: Finding) -> dict[str, str]:
    return {operand["name"]: operand["dtype"] for operand in finding.evidence["operands"]}


def assert_theirs(error: BaseException, raised: BaseException, finding: Finding) -> None:
    """The exception is the user's own object, and what is known of it is in its one note."""
    assert error is raised
    assert error.__cause__ is None
    (note,) = error.__notes__
    assert f"error[{finding.code}] {finding.name}: {finding.message}" in note
    assert finding.fix in note
    assert finding.host_fix is None or finding.host_fix in note


# MMEngine: the hand-written convolution of MMDetection's reports


class HandWritten(Guarded):
    """A convolution whose weight follows the input's dtype, and whose bias was forgotten."""

    def __init__(self, remedy: int = 0, since: int = 0) -> None:
        super().__init__(since)
        self.remedy = remedy
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.bias = nn.Parameter(torch.zeros(8))

    def sound(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)

    def fault(self, x: torch.Tensor) -> torch.Tensor:
        if self.remedy == 1:
            with torch.autocast(x.device.type, enabled=False):
                return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)
        if self.remedy == 2:
            return F.conv2d(x, self.weight.to(x.dtype), self.bias, padding=1)
        with torch.autocast(x.device.type, enabled=False):  # <- conv off
            return F.conv2d(x, self.weight.to(x.dtype), self.bias, padding=1)  # <- conv


@pytest.fixture
def runner(tmp_path: Path) -> Callable[..., Any]:
    """A Runner from the config file, for a net with ``HandWritten`` between backbone and head."""
    pytest.importorskip("mmengine")
    from hosts.mmengine_digits import MODELS, DigitsNet
    from mmengine.config import Config
    from mmengine.runner import Runner

    from ampcheck.integrations.mmengine import AmpCheckHook

    class HandWrittenNet(DigitsNet):
        def __init__(self, **options: int) -> None:
            super().__init__()
            self.backbone.append(nn.Conv2d(8, 8, 1))
            self.mix = HandWritten(**options)

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            features = self.backbone(images)  # <- conv made
            return self.head(self.mix(features).flatten(1))

    MODELS.register_module(module=HandWrittenNet, force=True)

    def build(checker: AmpChecker, **model: int) -> Any:
        config = Config.fromfile(HERE.with_name("mmengine_config.py"))
        config.work_dir = str(tmp_path / "run")
        config.experiment_name = f"crash{next(EXPERIMENT)}"
        config.model = {"type": "HandWrittenNet", **model}
        config.custom_hooks = []
        run = Runner.from_cfg(config)
        run.register_hook(AmpCheckHook(checker=checker))
        return run

    return build


@pytest.mark.parametrize("since", [0, 2])
def test_hand_written_convolution_in_mmengine(runner: Callable[..., Any], since: int) -> None:
    seen = checker()
    run = runner(seen, since=since)
    with pytest.raises(RuntimeError, match=r"Input type .* and bias type .* should be the same") as caught:
        run.train()
    finding = findings(seen)["AMP203"]
    assert_theirs(caught.value, run.model.mix.raised[0], finding)
    assert {one.code for one in findings(seen).values() if str(one.severity) == "error"} == {"AMP203"}
    assert finding.module == "mix"
    assert lines(finding, "raise") == ["conv"]
    assert lines(finding, "call") == ["conv off"]
    assert lines(finding, "cast") == ["conv made"]
    assert operands(finding) == {"x": "float16", "mix.weight": "float16", "mix.bias": "float32"}
    assert finding.evidence["reason"] == "autocast-disabled-here"
    assert failure(seen).step == since
    assert finding.fix.startswith("Cast self.bias like the others: `.to(x.dtype)`, or remove the region at ")


@pytest.mark.parametrize("remedy", [1, 2])
def test_hand_written_convolution_repaired(runner: Callable[..., Any], remedy: int) -> None:
    seen = checker()
    run = runner(seen, remedy=remedy)
    before = run.model.mix.bias.detach().clone()
    run.train()
    assert not [one for one in findings(seen).values() if str(one.severity) != "info"]
    assert not torch.equal(run.model.mix.bias, before)
    assert run.message_hub.get_scalar("val/accuracy").current() > 0.3


# Ultralytics: wavelet downsampling in a yaml model


def haar_filters() -> torch.Tensor:
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    return torch.stack([a[:, None] * b for a in (low, high) for b in (low, high)])[:, None] / 2


class Analysis(torch.autograd.Function):
    """One level of the transform; its backward is the synthesis with the same filters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(filters)
        ctx.channels = x.shape[1]
        return F.conv2d(x, filters, stride=2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (filters,) = ctx.saved_tensors
        return F.conv_transpose2d(gradient, filters, stride=2, groups=ctx.channels), None  # <- synthesis


class RepairedAnalysis(Analysis):
    forward = staticmethod(torch.amp.custom_fwd(Analysis.forward, device_type="cpu"))  # type: ignore[assignment]
    backward = staticmethod(torch.amp.custom_bwd(Analysis.backward, device_type="cpu"))  # type: ignore[assignment]


class Haar(Guarded):
    """Haar wavelets whose filter bank is a float32 buffer."""

    transform = Analysis

    def __init__(self, channels: int, since: int = 0) -> None:
        super().__init__(since)
        self.register_buffer("filters", haar_filters().repeat(channels, 1, 1, 1))

    def sound(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.filters, stride=2, groups=x.shape[1])

    def fault(self, x: torch.Tensor) -> torch.Tensor:
        return self.transform.apply(x, self.filters)


class RepairedHaar(Haar):
    transform = RepairedAnalysis


class PreciseHaar(Haar):
    """Keeps autocast away from the wavelets."""

    def fault(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):  # <- haar off
            return F.conv2d(x, self.filters, stride=2, groups=x.shape[1])  # <- haar


class CastPreciseHaar(Haar):
    def fault(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.filters, stride=2, groups=x.shape[1])


class WaveletDown(nn.Module):
    """Halves the resolution by wavelets and takes the four bands back to ``channels``."""

    def __init__(self, channels: int, transform: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.dwt = transform(channels)
        self.project = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.dwt(x))


WAVELETS = """\
nc: 10
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, WaveletDown, [16]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [-1, 1, Conv, [32, 3, 2]]
  - [[2, 3], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ultralytics")
    from hosts.ultralytics_scenes import draw_scenes

    return draw_scenes(tmp_path_factory.mktemp("scenes"), train=12, val=4)


@pytest.fixture
def yolo(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Train a detector with ``WaveletDown`` around ``transform``; returns its trainer."""
    monkeypatch.setitem(os.environ, "YOLO_OFFLINE", "1")
    from cases.hosts_ultralytics import SMALL, AmpTrainer
    from hosts.ultralytics_scenes import detector
    from ultralytics import YOLO
    from ultralytics.nn import tasks

    from ampcheck.integrations.ultralytics import AmpCheck

    def train(checker: AmpChecker, transform: Callable[[int], nn.Module], models: list[Any]) -> None:
        # The model is unpickled for its last evaluation, so its modules must be found by name: no partial inside.
        monkeypatch.setattr(tasks, "WaveletDown", lambda channels: WaveletDown(channels, transform), raising=False)
        model = YOLO(detector(tmp_path, WAVELETS))
        models.append(model)
        AmpCheck(checker=checker).attach(model)
        model.train(
            trainer=AmpTrainer,
            data=str(scenes),
            project=str(tmp_path / "runs"),
            **SMALL,
        )

    return train


@pytest.mark.parametrize("since", [0, 2])
def test_wavelets_with_autocast_off_in_ultralytics(yolo: Callable[..., Any], since: int) -> None:
    seen, models = checker(), []
    with pytest.raises(RuntimeError, match=r"Input type .* and weight type .* should be the same") as caught:
        yolo(seen, lambda channels: PreciseHaar(channels, since), models)
    finding = findings(seen)["AMP203"]
    haar = models[0].trainer.model.model[1].dwt
    assert_theirs(caught.value, haar.raised[0], finding)
    assert finding.module == "model.1.dwt"
    assert lines(finding, "raise") == ["haar"]
    assert lines(finding, "call") == ["haar off"]
    assert operands(finding) == {"x": "bfloat16", "model.1.dwt.filters": "float32"}
    assert finding.evidence["reason"] == "autocast-disabled-here"
    assert finding.fix.startswith("Cast to float32 first: `x.float()`, or remove the region at ")


@pytest.mark.parametrize("since", [0, 2])
def test_wavelets_in_a_custom_function_in_ultralytics(yolo: Callable[..., Any], since: int) -> None:
    """Autocast is on in its forward, and off in its backward."""
    seen, models = checker(), []
    with pytest.raises(RuntimeError, match=r"Input type .* and weight type .* should be the same") as caught:
        yolo(seen, lambda channels: Haar(channels, since), models)
    finding = findings(seen)["AMP205"]
    assert_theirs(caught.value, caught.value, finding)
    # AMP203 would say the same of the crash.
    assert "AMP203" not in findings(seen)
    assert "AMP203" not in caught.value.__notes__[0]
    assert lines(finding, "raise") == ["synthesis"]
    assert operands(finding) == {"gradient": "bfloat16", "model.1.dwt.filters": "float32"}
    assert finding.evidence["reason"] == "custom-function"
    assert finding.module == "model.1.dwt"
    assert failure(seen).phase == "backward"
    assert finding.fix == (
        "Decorate `Analysis.forward` with `@torch.amp.custom_fwd(device_type='cpu')` and its `backward` with "
        "`@torch.amp.custom_bwd(device_type='cpu')`."
    )


@pytest.mark.parametrize("transform", [RepairedHaar, CastPreciseHaar])
def test_wavelets_repaired(yolo: Callable[..., Any], transform: type[Haar]) -> None:
    seen, models = checker(), []
    yolo(seen, transform, models)
    assert not [one for one in findings(seen).values() if str(one.severity) != "info"]
    assert torch.isfinite(models[0].trainer.loss)


class Package(nn.Module):
    """``pytorch_wavelets`` as papers use it: the low band and the three high ones side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from pytorch_wavelets import DWTForward

        self.transform = DWTForward(J=1, wave="haar", mode="zero")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, (high,) = self.transform(x)
        return torch.cat([low[:, :, None], high], 2).flatten(1, 2)


def test_pytorch_wavelets_in_ultralytics(yolo: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lowlevel = pytest.importorskip("pytorch_wavelets.dwt.lowlevel", exc_type=ImportError)
    seen, models = checker(), []
    with pytest.raises(RuntimeError, match=r"Input type .* and weight type .* should be the same") as caught:
        yolo(seen, Package, models)
    finding = findings(seen)["AMP205"]
    assert_theirs(caught.value, caught.value, finding)
    assert finding.evidence["function"] == "AFB2D"
    assert finding.evidence["reason"] == "custom-function"
    assert finding.module == "model.1.dwt.transform"
    # The package's own variables, as its line has them: the filters are repeated for every channel.
    assert operands(finding) == {"lo": "bfloat16", "g0": "float32"}
    assert "`AFB2D.forward` with `@torch.amp.custom_fwd(device_type='cpu')`" in finding.fix
    assert "its `backward` with `@torch.amp.custom_bwd(device_type='cpu')`" in finding.fix

    function = lowlevel.AFB2D
    for name, decorate in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd)):
        decorated = decorate(getattr(function, name), device_type="cpu")
        monkeypatch.setattr(function, name, staticmethod(decorated))
    repaired = checker()
    yolo(repaired, Package, models)
    assert not [one for one in findings(repaired).values() if str(one.severity) != "info"]
    assert torch.isfinite(models[1].trainer.loss)


# Lightning: RF-DETR's keyword arguments for autocast, and gradients of a half model


class AmpKwargs(nn.Module):
    """A backbone whose keyword arguments for autocast are kept in a dict, one for training and one for evaluation."""

    def __init__(self, training: dict[str, Any], evaluation: dict[str, Any], since: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.amp_kwargs = training
        self.evaluation_kwargs = evaluation
        self.since = since
        self.calls = 0
        self.raised: list[BaseException] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            with torch.autocast(**self.evaluation_kwargs):
                return self.layers(x)
        self.calls += 1
        if self.calls <= self.since:
            return self.layers(x)
        try:
            with torch.autocast(**self.amp_kwargs):  # <- kwargs
                return self.layers(x)
        except Exception as error:
            self.raised.append(error)
            raise


def wrong_kwargs(since: int = 0) -> AmpKwargs:
    kwargs = dict(device="cpu", dtype=torch.bfloat16)  # noqa: C408 - as they write it
    return AmpKwargs(kwargs, {"device_type": "cpu", "dtype": torch.bfloat16}, since)


@pytest.fixture
def fit() -> Callable[..., Any]:
    """Fit ``net`` in pytorch_lightning; returns the LightningModule."""
    package = pytest.importorskip("pytorch_lightning")
    from hosts.lightning_digits import digits_module, loader, trainer

    from ampcheck.integrations.lightning import AmpCheck

    def fit(checker: AmpChecker, net: nn.Module, *, scaler: Any = None, raised: Any = None, **options: Any) -> Any:
        if scaler is not None:
            plugin = package.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
            options["plugins"] = [plugin]
        module = digits_module(package, net)
        if raised is not None:
            module.optimizer_step = keeping(raised, module.optimizer_step)
        run = trainer(package, AmpCheck(checker=checker), **options)
        run.fit(module, loader(), loader("val", 32))
        return module

    return fit


def keeping(raised: list[BaseException], step: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizer step; what it raises is kept too."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)  # <- optimizer step
        except Exception as error:
            raised.append(error)
            raise

    return call


@pytest.mark.parametrize("since", [0, 2])
def test_autocast_kwargs_in_lightning(fit: Callable[..., Any], since: int) -> None:
    seen, net = checker(), wrong_kwargs(since)
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'") as caught:
        fit(seen, net)
    finding = findings(seen)["AMP102"]
    assert_theirs(caught.value, net.raised[0], finding)
    assert [one.code for one in findings(seen).values() if str(one.severity) == "error"] == ["AMP102"]
    assert finding.module == "net"
    assert lines(finding, "raise") == ["kwargs"]
    assert failure(seen).step == since
    evidence = {key: finding.evidence[key] for key in ("reason", "argument", "value", "kwargs_variable")}
    assert evidence == {
        "reason": "device-keyword",
        "argument": "device",
        "value": "'cpu'",
        "kwargs_variable": "self.amp_kwargs",
    }
    corrected = finding.evidence["corrected"]
    assert finding.fix == f"Write `{corrected}`."

    repaired, net = checker(), wrong_kwargs(since)
    exec(corrected, {"self": net, "torch": torch})
    module = fit(repaired, net)
    assert not [one for one in findings(repaired).values() if str(one.severity) == "error"]
    assert all(torch.isfinite(torch.tensor(module.losses)))


def test_autocast_kwargs_that_differ_in_evaluation_in_lightning(fit: Callable[..., Any]) -> None:
    training = {"device_type": "cpu", "dtype": torch.bfloat16}
    evaluation = {"device_type": "cpu", "dtype": torch.float16}
    seen = checker()
    fit(seen, AmpKwargs(training, evaluation))
    (finding,) = findings(seen).values()
    assert (finding.code, str(finding.severity)) == ("AMP105", "warning")
    assert finding.evidence["training"] == "bfloat16"
    assert finding.evidence["evaluation"] == "float16"
    assert "net.layers.1" in finding.evidence["modules"]
    assert finding.fix.startswith("Run training and evaluation under the same `torch.autocast(...)`")
    assert "Remove `autocast` from the module" in finding.host_fix

    repaired = checker()
    fit(repaired, AmpKwargs(training, training))
    assert findings(repaired) == {}

    in_host = checker()
    fit(in_host, AmpKwargs(training, training).layers, precision="bf16-mixed")
    assert findings(in_host) == {}


def half_from(step: int) -> nn.Module:
    """A model that is half from its ``step``-th training call on, as after an evaluation that forgot to go back."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    if step == 0:
        return layers.half()

    def halve(module: nn.Module, args: Any) -> None:
        if module.training:
            halve.calls += 1  # type: ignore[attr-defined]
            if halve.calls == step + 1:  # type: ignore[attr-defined]
                module.half()

    halve.calls = 0  # type: ignore[attr-defined]
    layers.register_forward_pre_hook(halve)
    return layers


@pytest.mark.parametrize("step", [0, 2])
def test_half_model_in_lightning(fit: Callable[..., Any], step: int) -> None:
    seen, raised = checker(), []
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\.") as caught:
        fit(seen, half_from(step), scaler=torch.amp.GradScaler("cpu"), raised=raised)
    finding = findings(seen)["AMP303"]
    assert_theirs(caught.value, raised[0], finding)
    assert finding.evidence["count"] == finding.evidence["optimized"] == 2
    assert finding.evidence["parameters"] == ["net.1.weight", "net.1.bias"]
    assert failure(seen).phase == "unscale"
    assert failure(seen).step == step
    assert lines(finding, "raise") == ["optimizer step"]
    assert "`Trainer(precision='bf16-true')`, which has no scaler" in finding.host_fix


@pytest.mark.parametrize("options", [{"scaler": True}, {"precision": "bf16-true"}], ids=["float32-parameters", "true"])
def test_half_model_repaired_in_lightning(fit: Callable[..., Any], options: dict[str, Any]) -> None:
    """As the host's fix says: float32 parameters for ``16-mixed``, or ``bf16-true``, which has no scaler."""
    net = half_from(0) if "precision" in options else half_from(0).float()
    scaler = torch.amp.GradScaler("cpu") if "scaler" in options else None
    before = net[1].weight.detach().clone()
    seen = checker()
    module = fit(seen, net, **{**options, "scaler": scaler})
    assert not [one for one in findings(seen).values() if str(one.severity) == "error"]
    assert all(torch.isfinite(torch.tensor(module.losses)))
    assert not torch.equal(net[1].weight, before)
