"""A failing batch is run again as MMEngine runs it, in real Runners that train on scikit-learn's digits."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("mmengine")

from digits import upscaled
from hosts.mmengine_digits import DigitsNet
from mmengine.config import Config
from mmengine.optim import OptimWrapperDict
from mmengine.registry import MODELS, RUNNERS
from mmengine.runner import Runner

CONFIG = Path(__file__).with_name("mmengine_config.py")
EXPERIMENT = itertools.count()

FLOAT32 = {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}, "_delete_": True}
BFLOAT16 = {"dtype": "bfloat16", "loss_scale": {"enabled": False, "_delete_": True}}
TWO = {"constructor": "TwoPartConstructor", **FLOAT32}

Build = Callable[..., Runner]


@MODELS.register_module()
class TimmNet(DigitsNet):
    """Digits on a timm backbone, which is innocent: the dropout is its author's, in place from step ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        timm = pytest.importorskip("timm")
        self.backbone = timm.create_model("mobilenetv4_conv_small_050", num_classes=0)
        self.head = nn.Linear(self.backbone.head_hidden_size, 10)
        self.since, self.steps = since, 0

    def logits(self, images: Tensor) -> Tensor:
        self.steps += 1
        x = self.backbone(upscaled(images, 32))
        if self.steps < self.since:
            x = F.dropout(x, 0.2, training=self.training)
        else:
            x = F.dropout(x, 0.2, inplace=True, training=self.training)
        return self.head(x)


@MODELS.register_module()
class NeckNet(DigitsNet):
    """Adds in place, as some necks do, to what tanh has saved; from step ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.lateral = nn.Linear(128, 128)
        self.since, self.steps = since, 0

    def logits(self, images: Tensor) -> Tensor:
        self.steps += 1
        x = self.dropout(self.backbone(images).flatten(1))
        y = self.lateral(x).tanh()
        if self.steps >= self.since:
            y += x
        return self.head(y)


@MODELS.register_module()
class UnevenNet(DigitsNet):
    """Feeds low precision to a region without autocast from step ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.since, self.steps = since, 0

    def logits(self, images: Tensor) -> Tensor:
        self.steps += 1
        x = self.backbone(images).flatten(1)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(x if self.steps >= self.since else x.float())


@MODELS.register_module()
class TwoStepNet(DigitsNet):
    """Steps the head between the forward pass of a loss and its backward, from step ``since`` on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.since, self.steps = since, 0

    def train_step(self, data: Any, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        self.steps += 1
        images, labels = self.data_preprocessor(data, True)
        with optim_wrapper["backbone"].optim_context(self):
            one = self.loss(self.logits(images), labels)
            if self.steps < self.since:
                optim_wrapper["backbone"].backward(one)
            other = self.loss(self.logits(images).mul(2), labels)
        optim_wrapper["head"].update_params(other)
        if self.steps >= self.since:
            optim_wrapper["backbone"].backward(one)
        optim_wrapper["backbone"].step()
        optim_wrapper["backbone"].zero_grad()
        return {"loss": one.detach()}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(model: str, since: int, *, checked: bool = True, watch_steps: int = 1, **options: Any) -> Runner:
        config = Config.fromfile(CONFIG)
        number = next(EXPERIMENT)
        config.work_dir = str(tmp_path / f"run{number}")
        config.experiment_name = f"digits{number}"
        config.custom_hooks = [{"type": "AmpCheckHook", "watch_steps": watch_steps}] if checked else []
        config.train_dataloader.batch_size = 8
        config.train_dataloader.dataset.count = 48
        config.model = {"type": model, "since": since}
        config.merge_from_dict(copy.deepcopy(options))
        return RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)

    return build


def died(runner: Runner) -> Exception:
    with pytest.raises(RuntimeError) as caught:
        runner.train()
    return caught.value


def note_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def finding_of(runner: Runner, code: str) -> dict[str, Any]:
    report = json.loads((Path(runner.log_dir) / "ampcheck.json").read_text())
    (finding,) = (one for one in report["findings"] if one["code"] == code)
    return finding


def sites_of(finding: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {site["role"]: site for site in finding["sites"]}


def state(runner: Runner) -> dict[str, Any]:
    """Everything that a diagnosis could have changed, as bytes or plain values."""

    def content(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: content(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [content(item) for item in value]
        if isinstance(value, np.ndarray):
            return value.tobytes()
        return value.detach().float().numpy().tobytes() if isinstance(value, Tensor) else value

    model, wrapper = runner.model, runner.optim_wrapper
    wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    plain = (int, float, str, bool, type(None), list, dict)
    return {
        "tensors": {name: (content(one), one.requires_grad) for name, one in model.state_dict(keep_vars=True).items()},
        "gradients": {name: content(one.grad) for name, one in model.named_parameters()},
        "wrappers": [(content(one.state_dict()), one._inner_count, sorted(vars(one))) for one in wrappers],
        "random": content([torch.get_rng_state(), list(random.getstate()), np.random.get_state()]),
        "attributes": {
            name: {key: repr(value) if isinstance(value, plain) else type(value) for key, value in vars(part).items()}
            for name, part in model.named_modules()
        },
        "progress": (runner.epoch, runner.iter),
    }


@pytest.mark.parametrize("since", [1, 3])
@pytest.mark.parametrize("optim_wrapper", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_dropout_in_place_on_a_timm_backbone(build: Build, since: int, optim_wrapper: dict[str, Any]) -> None:
    runner = build("TimmNet", since, optim_wrapper=optim_wrapper)
    note = note_of(died(runner))
    finding = finding_of(runner, "AMP401")
    sites = sites_of(finding)
    assert sites["write"]["code"] == "x = F.dropout(x, 0.2, inplace=True, training=self.training)"
    assert sites["save"]["code"] == "x = self.backbone(upscaled(images, 32))"
    assert sites["save"]["module"] == "backbone.norm_head.act"
    assert (finding["evidence"]["node"], finding["evidence"]["slot"]) == ("ReluBackward0", "result")
    assert re.search(
        r"Write `x = F\.dropout\(x, 0\.2, training=self\.training\)` at \S*test_replay_mmengine\.py:\d+\.", note
    )
    assert "mmengine If an activation writes, set `inplace=False` in the `act_cfg` of its block" in note


@MODELS.register_module()
class UnseenNet(DigitsNet):
    """Writes past the version counter to what tanh has saved: nothing is raised."""

    def __init__(self, since: int) -> None:
        super().__init__()

    def logits(self, images: Tensor) -> Tensor:
        y = self.backbone(images).flatten(1).tanh()
        y.data[:, 0] = 0.5
        return self.head(y)


def test_a_write_that_nothing_raises_for(build: Build) -> None:
    runner = build("UnseenNet", 0)
    runner.train()
    sites = sites_of(finding_of(runner, "AMP402"))
    assert sites["write"]["code"] == "y.data[:, 0] = 0.5"
    assert "tanh" in sites["save"]["code"]


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "float32": ("NeckNet", 3, {"optim_wrapper": FLOAT32}),
    "bfloat16": ("NeckNet", 3, {"optim_wrapper": BFLOAT16}),
    "float16 with a scaler": ("NeckNet", 3, {}),
    "accumulation": ("NeckNet", 4, {"optim_wrapper": {"accumulative_counts": 3}}),
    "clipping": ("NeckNet", 3, {"optim_wrapper": {"clip_grad": {"max_norm": 1.0}}}),
    "no step watched": ("NeckNet", 1, {"watch_steps": 0}),
    "two optimizers": ("TwoStepNet", 3, {"optim_wrapper": TWO}),
    "two optimizers, first step": ("TwoStepNet", 1, {"optim_wrapper": TWO, "watch_steps": 0}),
    "iterations": (
        "NeckNet",
        3,
        {"train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 6, "val_interval": 6, "_delete_": True}},
    ),
    "flexible runner": (
        "NeckNet",
        3,
        {"runner_type": "FlexibleRunner", "strategy": {"type": "SingleDeviceStrategy"}, "env_cfg": {}},
    ),
    "compiled": ("NeckNet", 3, {"compile": {"backend": "eager"}, "optim_wrapper": FLOAT32}),
}


@pytest.mark.parametrize("name", CASES)
def test_diagnosis_changes_nothing(build: Build, name: str) -> None:
    """Beside the same run without AmpCheck: what it leaves is the same to the last bit."""
    model, since, options = CASES[name]
    outcomes = []
    for checked in (False, True):
        torch._dynamo.reset()
        runner = build(model, since, checked=checked, **options)
        error = died(runner)
        outcomes.append((str(error), state(runner)))
        assert ("written here by" in note_of(error)) is checked
    assert outcomes[0] == outcomes[1]
    code = "AMP405" if model == "TwoStepNet" else "AMP401"
    assert finding_of(runner, code)["severity"] == "error"
    if code == "AMP401":
        assert sites_of(finding_of(runner, code))["write"]["code"] == "y += x"


def test_state_sees_a_change(build: Build) -> None:
    runner = build("NeckNet", 3)
    died(runner)
    before = state(runner)
    assert state(runner) == before
    for change in (
        lambda: runner.model.backbone[1].running_mean.add_(1),
        lambda: torch.rand(1),
        lambda: vars(runner.model).update(log=print),
        lambda: vars(runner.optim_wrapper).update(step=print),
        lambda: runner.optim_wrapper.optimizer.state.clear(),
    ):
        change()
        after = state(runner)
        assert after != before
        before = after


def test_step_between_forward_and_backward(build: Build) -> None:
    runner = build("TwoStepNet", 3, optim_wrapper=TWO)
    note = note_of(died(runner))
    finding = finding_of(runner, "AMP405")
    sites = sites_of(finding)
    assert sites["write"]["code"] == 'optim_wrapper["head"].update_params(other)'
    assert "self.head(" in sites["save"]["code"]
    assert finding["evidence"]["parameters"] == ["head.weight"]
    assert "In your own `train_step`" in note


def test_dtype_crash_at_a_later_step(build: Build) -> None:
    runner = build("UnevenNet", 3, optim_wrapper=BFLOAT16)
    note = note_of(died(runner))
    finding = finding_of(runner, "AMP203")
    assert finding["evidence"]["reason"] == "autocast-disabled-here"
    assert finding["module"] == "head"
    assert "mmengine.runner.autocast(enabled=False)" in note


def test_crash_outside_the_step_is_not_replayed(build: Build) -> None:
    from mmengine.hooks import Hook

    class Broken(Hook):
        def after_train_epoch(self, runner: Runner) -> None:
            x = torch.ones(2, requires_grad=True).exp()
            x.mul_(2)
            x.sum().backward()

    runner = build("NeckNet", 9)
    runner.register_hook(Broken())
    assert "AMP401" in note_of(died(runner))
    assert runner.model.steps == 6
