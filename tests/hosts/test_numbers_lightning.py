"""Numbers that fail in Lightning's real trainer, on real digits."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_layers import LAYERS, STEP, Angle, DigitNet, Late, Masked, Scores, Statistics, assert_true
from lightning_digits import digits_module, installed, loader, trainer

INSTALLED = installed()
if not INSTALLED:
    pytest.skip("neither of Lightning's packages is installed", allow_module_level=True)

from ampcheck.integrations.lightning import FIXES, AmpCheck  # noqa: E402

lightning = INSTALLED[0]


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fp16() -> dict[str, Any]:
    """``16-mixed`` as on a GPU; ``Trainer(precision="16-mixed")`` would turn it into ``bf16-mixed`` on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    return {"plugins": [lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}


def bf16() -> dict[str, Any]:
    return {"precision": "bf16-mixed"}


def fitted(layer: Any, numerics: str, *, manual: bool = False, **options: Any) -> tuple[AmpCheck, Any, Any]:
    callback = AmpCheck(ignore=("AMP107", "AMP310"), numerics=numerics)
    module = digits_module(lightning, DigitNet(layer), manual=manual)
    run = trainer(lightning, callback, **options)
    run.fit(module, loader(count=192), loader("val", 32))
    return callback, module, run


def numeric(callback: AmpCheck) -> list[Any]:
    findings = callback.checker.report.findings
    return [one for one in findings if one.code.startswith("AMP5") and one.code not in ("AMP512", "AMP515")]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("layer", LAYERS)
def test_guard(layer: type[Late], manual: bool) -> None:
    options = fp16() if layer.only_float16 else bf16()
    callback, _, _ = fitted(layer(), "guard", manual=manual, **options)
    (finding,) = numeric(callback)
    assert_true(finding, layer, "net.layer")


@pytest.mark.parametrize("layer", [Scores, Angle, Masked])
def test_stop(layer: type[Late]) -> None:
    callback = AmpCheck(numerics="stop", ignore="AMP107")
    module = digits_module(lightning, DigitNet(layer()))
    weights: list[dict[str, torch.Tensor]] = []
    module.on_train_batch_start = lambda *_: weights.append(copy.deepcopy(dict(module.named_parameters())))
    run = trainer(lightning, callback, **(fp16() if layer.only_float16 else bf16()))
    with pytest.raises(FloatingPointError, match=f"of step {STEP} is not finite") as raised:
        run.fit(module, loader(count=192))
    (finding,) = numeric(callback)
    assert_true(finding, layer, "net.layer")
    assert finding.code in raised.value.__notes__[0]
    assert len(weights) == STEP + 1
    assert all(torch.equal(value, weights[-1][name]) for name, value in module.named_parameters())
    assert finding.host_fix == FIXES.get(f"{finding.code}:bfloat16")


def test_free_finds_statistics_at_the_next_stop() -> None:
    callback, _, _ = fitted(Statistics(), "free", **fp16())
    (finding,) = numeric(callback)
    assert finding.code == "AMP511"
    assert finding.evidence["moment"] == "before the validation of epoch 0"
    assert finding.evidence["buffers"] == ["net.layer.norm.running_mean", "net.layer.norm.running_var"]
    assert finding.host_fix == FIXES["AMP511"]


@pytest.mark.parametrize("numerics", ["guard", "free"])
def test_free_finds_weights_and_guard_the_step(numerics: str) -> None:
    callback, _, _ = fitted(Angle(), numerics, **bf16())
    (finding,) = numeric(callback)
    assert finding.code == ("AMP511" if numerics == "free" else "AMP504")


def test_free_is_told_the_loss_and_looks_at_the_next_steps() -> None:
    module = digits_module(lightning, DigitNet(Scores()))
    training_step = module.training_step

    def logging(batch: Any, batch_idx: int) -> torch.Tensor:
        loss = training_step(batch, batch_idx)
        module.log("train_loss", loss)
        return loss

    module.training_step = logging
    callback = AmpCheck(ignore=("AMP107", "AMP310"))
    trainer(lightning, callback, max_epochs=2, **fp16()).fit(module, loader(count=192))
    (finding,) = numeric(callback)
    assert_true(finding, Scores, "net.layer", 12)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_is_the_host_s_after_a_resume(accumulate: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": accumulate, **bf16()}
    run = trainer(lightning, **options)
    run.fit(digits_module(lightning, DigitNet(Angle())), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    before = run.global_step
    assert before == 4 // accumulate
    callback = AmpCheck(ignore="AMP107", numerics="guard")
    module = digits_module(lightning, DigitNet(Angle()))
    resumed = trainer(lightning, callback, max_epochs=5, **options)
    resumed.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    (finding,) = numeric(callback)
    assert_true(finding, Angle, "net.layer", before + STEP // accumulate)


def test_no_step_is_told_of_two_optimizers() -> None:
    class Two(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = DigitNet(Angle())

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net.head.parameters(), 0.1), torch.optim.SGD(self.net.stem.parameters(), 0.1)]

    callback = AmpCheck(ignore="AMP107", numerics="guard")
    trainer(lightning, callback, **bf16()).fit(Two(), loader(count=192))
    (finding,) = numeric(callback)
    assert_true(finding, Angle, "net.layer", None)


def test_a_step_that_the_module_leaves_out_is_not_one_that_the_scaler_skipped(tmp_path: Path) -> None:
    module = digits_module(lightning)
    training_step = module.training_step
    module.training_step = lambda batch, batch_idx: training_step(batch, batch_idx) if batch_idx % 2 else None
    callback = AmpCheck(ignore=("AMP107", "AMP310"))
    trainer(lightning, callback, **fp16()).fit(module, loader(count=192))
    assert callback.checker.report.findings == ()


def test_healthy_run_says_nothing_and_is_bit_identical() -> None:
    def trained(numerics: str | None) -> list[bytes]:
        callback = AmpCheck(ignore="AMP107", numerics=numerics) if numerics else None
        module = digits_module(lightning)
        run = trainer(lightning, *([callback] if callback else []), max_epochs=2, **fp16())
        run.fit(module, loader(count=128), loader("val", 32))
        if callback is not None:
            assert callback.checker.report.findings == ()
        states = [*module.state_dict().values(), torch.tensor(module.losses), torch.get_rng_state()]
        for state in run.optimizers[0].state.values():
            states += state.values()
        return [one.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for one in states]

    plain = trained(None)
    for numerics in ("free", "guard", "stop"):
        assert trained(numerics) == plain


@pytest.mark.parametrize("numerics", ["free", "guard", "stop"])
@pytest.mark.parametrize("dies", [False, True])
def test_nothing_stays_behind(numerics: str, dies: bool) -> None:
    engine, step = torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__
    layer = Scores(step=2) if numerics == "stop" and dies else Scores(step=99)
    callback = AmpCheck(numerics=numerics)
    module = digits_module(lightning, DigitNet(layer))
    if dies and numerics != "stop":
        module.on_train_batch_end = lambda *_: {}["missing"]
    run = trainer(lightning, callback, **fp16())
    try:
        run.fit(module, loader(count=64))
    except (KeyError, FloatingPointError):
        assert dies
    else:
        assert not dies
    assert (torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__) == (engine, step)
    gone = weakref.ref(module.net.layer)
    checker = callback.checker
    # Lightning leaves the module's `log` on its callbacks.
    del run, module, layer, callback
    gc.collect()
    assert gone() is None
    assert checker.report is not None
