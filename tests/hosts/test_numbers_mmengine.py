"""Numbers that fail in MMEngine's real Runner, on real digits."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine")

from failing_layers import LAYERS, STEP, Angle, DigitNet, Late, Masked, Scores, Statistics, assert_true
from hosts.mmengine_digits import DigitsNet
from hosts.test_mmengine import BFLOAT16, Build, Look, build, lines_of, one_thread  # noqa: F401
from mmengine.registry import MODELS
from mmengine.runner import Runner

from ampcheck import Finding


@MODELS.register_module(force=True)
class LayerNet(DigitsNet):
    def __init__(self, layer: str, step: int = STEP) -> None:
        super().__init__()
        layers: dict[str, type[nn.Module]] = {one.__name__: one for one in (*LAYERS, Statistics)}
        self.net = DigitNet(layers[layer](step=step))

    def logits(self, images: Tensor) -> Tensor:
        return self.net(images)


def options(layer: type[nn.Module], numerics: str, **more: Any) -> dict[str, Any]:
    hook = {"type": "AmpCheckHook", "ignore": "AMP105,AMP107,AMP310", "numerics": numerics}
    precision = {} if getattr(layer, "only_float16", True) else copy.deepcopy(BFLOAT16)
    return {
        "model": {"type": "LayerNet", "layer": layer.__name__},
        "custom_hooks": [hook],
        "optim_wrapper": precision,
    } | more


def checker_of(runner: Runner) -> Any:
    return next(hook.checker for hook in runner.hooks if type(hook).__name__ == "AmpCheckHook")


def numeric(runner: Runner) -> list[Finding]:
    findings = checker_of(runner).report.findings
    return [one for one in findings if one.code.startswith("AMP5") and one.code not in ("AMP512", "AMP515")]


@pytest.mark.parametrize("layer", LAYERS)
def test_guard(build: Build, layer: type[Late]) -> None:  # noqa: F811
    runner = build(**options(layer, "guard"))
    runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, layer, "net.layer")
    told = json.loads((Path(runner.log_dir) / "ampcheck.json").read_text())
    assert finding.code in {one["code"] for one in told["findings"]}


@pytest.mark.parametrize("layer", [Scores, Angle])
def test_stop(build: Build, layer: type[Late]) -> None:  # noqa: F811
    weights: list[dict[str, Tensor]] = []
    keep = Look(lambda runner, _: weights.append(copy.deepcopy(dict(runner.model.named_parameters()))))
    runner = build(keep, **options(layer, "stop"))
    with pytest.raises(FloatingPointError, match=f"of step {STEP} is not finite") as raised:
        runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, layer, "net.layer")
    assert finding.code in raised.value.__notes__[0]
    assert len(weights) == STEP
    assert all(torch.equal(value, weights[-1][name]) for name, value in runner.model.named_parameters())
    if layer is Scores:
        assert finding.host_fix is not None
        assert "`dtype='bfloat16'` in `optim_wrapper`" in finding.host_fix


@pytest.mark.parametrize("loop", ["epochs", "iterations"])
def test_free_finds_statistics_at_the_next_stop(build: Build, loop: str) -> None:  # noqa: F811
    more = {"train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 20, "val_interval": 10, "_delete_": True}}
    runner = build(**options(Statistics, "free", **(more if loop == "iterations" else {})))
    runner.train()
    (finding,) = numeric(runner)
    assert finding.code == "AMP511"
    moment = "at the end of epoch 1" if loop == "epochs" else "before the validation after iteration 10"
    assert finding.evidence["moment"] == moment
    assert finding.evidence["buffers"] == ["net.layer.norm.running_mean", "net.layer.norm.running_var"]
    assert finding.host_fix is not None
    assert "`load_from`" in finding.host_fix


def test_free_is_told_the_loss_and_looks_at_the_next_steps(build: Build) -> None:  # noqa: F811
    runner = build(**options(Scores, "free", train_cfg={"max_epochs": 2}))
    runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, Scores, "net.layer", 20)


def test_step_under_accumulation(build: Build) -> None:  # noqa: F811
    runner = build(**options(Scores, "guard", optim_wrapper={"accumulative_counts": 2}))
    runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, Scores, "net.layer", STEP // 2)


def test_step_is_the_host_s_after_a_resume(build: Build) -> None:  # noqa: F811
    runner = build(**options(Scores, "guard", train_cfg={"max_epochs": 2}))
    loop = runner.train_loop
    loop._iter, loop._epoch = 20, 1
    runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, Scores, "net.layer", 20 + STEP)


def test_no_step_is_told_of_two_optimizers(build: Build) -> None:  # noqa: F811
    runner = build(
        **options(
            Masked, "guard", model={"type": "TwoPartLayerNet", "layer": "Masked"},
            optim_wrapper={**copy.deepcopy(BFLOAT16), "constructor": "TwoPartConstructor"},
        )
    )  # fmt: skip
    runner.train()
    (finding,) = numeric(runner)
    assert_true(finding, Masked, "net.layer", None)


@MODELS.register_module(force=True)
class TwoPartLayerNet(MODELS.get("TwoPartDigitsNet")):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.net = DigitNet(Masked())

    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images) + self.net(images)


def test_healthy_run_says_nothing_and_is_bit_identical(build: Build) -> None:  # noqa: F811
    def trained(numerics: str | None) -> list[bytes]:
        look = Look()
        hooks = [{"type": "AmpCheckHook", "ignore": "AMP105,AMP107,AMP310", "numerics": numerics}] if numerics else []
        runner = build(look, custom_hooks=hooks)
        runner.train()
        assert not numerics or checker_of(runner).report.findings == ()
        assert not numerics or len([line for line in lines_of(runner) if not line.startswith("not judged")]) == 3
        momenta = [state["momentum_buffer"] for state in runner.optim_wrapper.optimizer.state.values()]
        tensors = [*look.losses, *runner.model.state_dict().values(), *momenta, torch.get_rng_state()]
        return [torch.atleast_1d(one).contiguous().view(torch.uint8).numpy().tobytes() for one in tensors]

    plain = trained(None)
    for numerics in ("free", "guard", "stop"):
        assert trained(numerics) == plain


@pytest.mark.parametrize("numerics", ["free", "guard", "stop"])
def test_nothing_stays_behind(build: Build, numerics: str) -> None:  # noqa: F811
    engine, step = torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__
    runner = build(**options(Scores, numerics))
    try:
        runner.train()
    except FloatingPointError:
        assert numerics == "stop"
    assert (torch.autograd.backward.__code__, torch.amp.GradScaler.step.__code__) == (engine, step)
    run = checker_of(runner)._run
    kept = weakref.ref(runner.model)
    found = [one for one in gc.get_referrers(kept()) if one is vars(run)]
    assert (found, run.held, run.numerics, run.find_batch) == ([], None, None, None)
