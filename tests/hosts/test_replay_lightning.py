"""A failing batch is run again as Lightning runs it, in real trainers on real digits."""

from __future__ import annotations

import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import digits, upscaled
from lightning_digits import installed, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

INSTALLED = installed()
if not INSTALLED:
    pytest.skip("neither of Lightning's packages is installed", allow_module_level=True)

from ampcheck.integrations.lightning import AmpCheck  # noqa: E402

lightning = INSTALLED[0]
MixedPrecision = lightning.plugins.MixedPrecision


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Classifier(nn.Module):
    """A classifier on a timm backbone, which is innocent: the dropout is its author's. In place from call ``since``."""

    def __init__(self, since: int) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.backbone = timm.create_model("mobilenetv4_conv_small_050", num_classes=0)
        self.head = nn.Linear(self.backbone.head_hidden_size, 10)
        self.since, self.calls = since, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.backbone(upscaled(images, 32))
        if self.calls < self.since:
            x = F.dropout(x, 0.2, training=self.training)
        else:
            x = F.dropout(x, 0.2, inplace=True, training=self.training)
        return self.head(x)


class Small(nn.Module):
    """Writes to what tanh has saved from call ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.since, self.calls = since, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.norm(self.fc(images.flatten(1))).tanh()
        if self.calls >= self.since:
            x *= 0.5
        return self.head(F.dropout(x, 0.2, training=self.training))


class Mixed(nn.Module):
    """Has a region without autocast, which it feeds low precision from call ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(64, 16), nn.Linear(16, 10)
        self.since, self.calls = since, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.fc(images.flatten(1))
        with torch.autocast("cpu", enabled=False):
            return self.head(x if self.calls >= self.since else x.float())


class Module(lightning.LightningModule):
    """Trains ``net``; ``steps`` counts what its author would count, and its losses are logged."""

    def __init__(self, net: nn.Module, *, manual: bool = False, output: str = "tensor") -> None:
        super().__init__()
        self.net = net
        self.automatic_optimization = not manual
        self.output = output
        self.steps = 0
        self.losses: list[float] = []
        self.seen: dict[str, int] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        self.steps += 1
        self.seen[f"batch {self.steps}"] = batch_idx
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.lr_schedulers().step()
        return {"loss": loss, "labels": labels} if self.output == "dict" else loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)]


class Gan(lightning.LightningModule):
    """Steps the discriminator between the forward pass of the generator's loss and its backward: from batch ``since``
    on, before that the other way round."""

    def __init__(self, since: int, *, toggled: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        self.since, self.toggled = since, toggled

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        images = batch[0].flatten(1)
        fake = self.generator(torch.randn(len(images), 8))
        verdict = self.discriminator(fake)
        if batch_idx < self.since:
            self.improve(of_generator, -verdict.mean())
        if self.toggled:
            self.toggle_optimizer(of_discriminator)
        self.improve(of_discriminator, self.discriminator(fake.detach()).mean() - self.discriminator(images).mean())
        if self.toggled:
            self.untoggle_optimizer(of_discriminator)
            self.toggle_optimizer(of_generator)
        if batch_idx >= self.since:
            self.improve(of_generator, -verdict.mean())
        if self.toggled:
            self.untoggle_optimizer(of_generator)

    def improve(self, optimizer: Any, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters()) for part in (self.generator, self.discriminator)]


def fp16() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]


def died(make: Callable[[], Any], *callbacks: Any, data: Any = None, **options: Any) -> tuple[Exception, Any, Any]:
    """What a fit raised, with its trainer and its module. Options that can be called are made for it."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    module = make()
    made = {name: option() if callable(option) else option for name, option in options.items()}
    fit = trainer(lightning, *callbacks, **made)
    with pytest.raises(RuntimeError) as caught:
        fit.fit(module, data if data is not None else loader(count=48, batch_size=8))
    return caught.value, fit, module


def state(fit: Any, module: Any) -> dict[str, Any]:
    """Everything that a diagnosis could have changed, as bytes or plain values."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: content(item) for key, item in value.items()}
        if isinstance(value, list):
            return [content(item) for item in value]
        return value.detach().numpy().tobytes() if isinstance(value, torch.Tensor) else value

    plain = (int, float, str, bool, type(None), list, dict)
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        "tensors": {name: (content(one), one.requires_grad) for name, one in named},
        "gradients": {name: content(one.grad) for name, one in module.named_parameters()},
        "optimizers": content([optimizer.state_dict() for optimizer in fit.optimizers]),
        "schedulers": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
        "scaler": getattr(fit.precision_plugin, "scaler", None) and fit.precision_plugin.scaler.state_dict(),
        "random": (content(torch.get_rng_state()), random.getstate(), pickle.dumps(np.random.get_state())),
        "attributes": {
            name: {key: repr(value) if isinstance(value, plain) else type(value) for key, value in vars(part).items()}
            for name, part in module.named_modules()
            if name == "" or "backbone" not in name
        },
        "progress": (fit.global_step, fit.fit_loop.state_dict()),
        "logged": {name: float(value) for name, value in fit.callback_metrics.items()},
    }


def note_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def finding_of(callback: AmpCheck, code: str) -> dict[str, Any]:
    assert callback.checker.report is not None
    (finding,) = (one for one in callback.checker.report.to_dict()["findings"] if one["code"] == code)
    return finding


def sites_of(finding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {site["role"]: site for site in finding["sites"]}


BF16 = {"precision": "bf16-mixed"}


@pytest.mark.parametrize("since", [1, 3], ids=["first step", "third step"])
@pytest.mark.parametrize("options", [{}, BF16], ids=["float32", "bfloat16"])
def test_dropout_in_place_on_a_timm_backbone(since: int, options: dict[str, Any]) -> None:
    callback = AmpCheck()
    error, _, _ = died(lambda: Module(Classifier(since)), callback, **options)
    finding = finding_of(callback, "AMP401")
    sites = sites_of(finding)
    assert sites["write"]["code"].startswith("x = F.dropout(x, 0.2")
    assert sites["write"]["module"] == "net"
    assert sites["save"]["module"].startswith("net.backbone.")
    assert finding["evidence"]["node"] == "ReluBackward0"
    assert finding["evidence"]["slot"] == "result"
    note = note_of(error)
    assert "Write `x = F.dropout(x, 0.2, training=self.training)` at test_replay_lightning.py:" in note
    assert "lightning Do not write in place before `training_step` returns" in note
    assert callback.checker.report is not None
    assert callback.checker.report.to_dict()["failure"]["step"] == since - 1


class Numbered(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*digits("train", 48), strict=True)


CASES = {
    "float32": (lambda: Module(Small(3)), {}),
    "bfloat16": (lambda: Module(Small(3)), BF16),
    "float16 with a scaler": (lambda: Module(Small(3)), {"plugins": fp16}),
    "dict of outputs": (lambda: Module(Small(3), output="dict"), {}),
    "accumulation": (lambda: Module(Small(4)), {"accumulate_grad_batches": 2}),
    "accumulation, no step due": (lambda: Module(Small(3)), {"accumulate_grad_batches": 2}),
    "manual optimization": (lambda: Module(Small(3), manual=True), {}),
    "manual optimization with a scaler": (lambda: Module(Small(3), manual=True), {"plugins": fp16}),
    "timm backbone": (lambda: Module(Classifier(3)), BF16),
    "no step watched": (lambda: Module(Small(1), manual=True), {}),
    "two optimizers": (lambda: Gan(2), {}),
    "two optimizers, first step": (lambda: Gan(0), {}),
    "toggled optimizers": (lambda: Gan(2, toggled=True), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_diagnosis_changes_nothing(name: str) -> None:
    """Beside the same fit without AmpCheck: what it leaves is the same to the last bit."""
    make, options = CASES[name]
    plain, fit, module = died(make, **options)
    before = state(fit, module)
    callback = AmpCheck(watch_steps=0 if "first" in name or "no step" in name else 1, report=False)
    error, fit, module = died(make, callback, **options)
    assert "error[AMP40" in note_of(error)
    assert "written here by" in note_of(error)
    assert str(error) == str(plain)
    assert state(fit, module) == before


def test_state_sees_a_change() -> None:
    _, fit, module = died(lambda: Module(Small(4)), accumulate_grad_batches=2)
    before = state(fit, module)
    assert state(fit, module) == before
    for change in (
        lambda: module.net.norm.running_mean.add_(1),
        lambda: module.net.fc.weight.grad.neg_(),
        lambda: torch.rand(1),
        lambda: vars(module).update(log=print),
        lambda: fit.optimizers[0].state.clear(),
    ):
        change()
        after = state(fit, module)
        assert after != before
        before = after


@pytest.mark.parametrize(
    "name", ["manual optimization", "accumulation", "accumulation, no step due", "dict of outputs"]
)
def test_write_and_save_are_named(name: str) -> None:
    make, options = CASES[name]
    callback = AmpCheck()
    died(make, callback, **options)
    finding = finding_of(callback, "AMP401")
    sites = sites_of(finding)
    assert sites["write"]["code"] == "x *= 0.5"
    assert "tanh()" in sites["save"]["code"]
    assert finding["evidence"]["node"] == "TanhBackward0"


class Unseen(nn.Module):
    """Writes past the version counter to what softmax has saved: nothing is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.fc(images.flatten(1)).softmax(-1)
        x.data[:, 0] = 0.5
        return x * x


@pytest.mark.parametrize("manual", [False, True])
def test_a_write_that_nothing_raises_for(manual: bool) -> None:
    callback = AmpCheck()
    torch.manual_seed(0)
    trainer(lightning, callback).fit(Module(Unseen(), manual=manual), loader(count=48, batch_size=8))
    sites = sites_of(finding_of(callback, "AMP402"))
    assert sites["write"]["code"] == "x.data[:, 0] = 0.5"
    assert "softmax" in sites["save"]["code"]


@pytest.mark.parametrize("toggled", [False, True])
@pytest.mark.parametrize("since", [0, 2])
def test_step_between_forward_and_backward(since: int, toggled: bool) -> None:
    callback = AmpCheck()
    error, _, _ = died(lambda: Gan(since, toggled=toggled), callback)
    finding = finding_of(callback, "AMP405")
    sites = sites_of(finding)
    assert sites["write"]["code"] == "optimizer.step()"
    assert sites["save"]["code"] == "verdict = self.discriminator(fake)"
    assert finding["evidence"]["parameters"][0].startswith("discriminator.")
    assert "`toggle_optimizer()` does not change this" in note_of(error)


def test_dtype_crash_at_a_later_step() -> None:
    callback = AmpCheck()
    error, _, _ = died(lambda: Module(Mixed(3)), callback, **BF16)
    finding = finding_of(callback, "AMP203")
    assert finding["evidence"]["reason"] == "autocast-disabled-here"
    assert finding["module"] == "net.head"
    assert "net.fc" in note_of(error)
    assert "covers only `training_step` and the other `*_step` methods" in note_of(error)


@pytest.fixture
def compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this PyTorch runs nothing compiled eagerly")
@pytest.mark.parametrize("since", [1, 3])
@pytest.mark.parametrize("what", ["network", "module"])
@pytest.mark.usefixtures("compiling")
def test_compiled(what: str, since: int) -> None:
    """What is compiled is replayed eagerly, also where it fails in the step that was watched."""

    def make() -> Any:
        if what == "network":
            return Module(torch.compile(Small(since), backend="eager"))
        return torch.compile(Module(Small(since)), backend="eager")

    callback = AmpCheck()
    died(make, callback)
    assert sites_of(finding_of(callback, "AMP401"))["write"]["code"] == "x *= 0.5"


def test_batch_of_a_stream() -> None:
    callback = AmpCheck()
    died(lambda: Module(Small(3)), callback, data=DataLoader(Numbered(), 8))
    assert sites_of(finding_of(callback, "AMP401"))["write"]["code"] == "x *= 0.5"


def test_batch_that_cannot_be_had_again() -> None:
    """A step that takes the iterator has consumed its batch: the frames tell what they can, and no batch is lost."""

    class Fetching(Module):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            images, labels = batch
            self.steps += 1
            return F.cross_entropy(self.net(images), labels)

    callback = AmpCheck()
    error, _, module = died(lambda: Fetching(Small(3)), callback)
    assert "AmpCheck did not see which line wrote" in note_of(error)
    assert module.steps == 3


def test_crash_outside_the_step_is_not_replayed() -> None:
    class Broken(Module):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.steps == 3:
                x = nn.Parameter(torch.ones(2)).exp()
                x.mul_(2)
                x.sum().backward()

    callback = AmpCheck()
    error, _, module = died(lambda: Broken(Small(9)), callback)
    assert "AMP401" in note_of(error)
    assert module.steps == len(module.losses) == 3


def test_no_batch_is_kept_while_training_goes_well() -> None:
    alive: list[int] = []
    batches: list[Any] = []

    class Watching(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            gc.collect()
            alive.append(sum(one() is not None for one in batches))
            batches.append(weakref.ref(batch[0]))

    trainer(lightning, AmpCheck(), limit_train_batches=5).fit(Watching(Small(9)), loader(count=48, batch_size=8))
    assert alive[-1] <= 1
