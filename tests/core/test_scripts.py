"""Scripts as people write them: a model in parts, autocast around the loss alone, an optimizer of another model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ampcheck
from ampcheck import Finding, Report


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.backbone(x)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 8), torch.tensor([0, 1, 2, 0])


def bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def watched(train: Callable[[], None], model: nn.Module | None = None) -> Report:
    with ampcheck.watch(model, emit=[].append, report=False) as watch:
        train()
    assert watch.report is not None
    return watch.report


def codes(report: Report) -> dict[str, str]:
    return {finding.code: str(finding.severity) for finding in report.findings}


def only(report: Report) -> Finding:
    (finding,) = report.findings
    return finding


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def train() -> None:
        for _ in range(3):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return train


@pytest.mark.parametrize("given", [True, False])
def test_a_model_called_by_its_parts_is_known_whole(given: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(3):
            x, y = batch()
            with bf16():
                loss = F.cross_entropy(model.head(torch.relu(model.backbone(x))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    report = watched(train, model if given else None)
    assert report.findings == ()
    modules = {row["name"]: row["calls"] for row in report.to_dict()["modules"]}
    assert modules == {"": 0, "backbone": 1, "head": 1}


def test_the_model_of_a_trainer_object() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = Net()
            self.optimizer = torch.optim.SGD(self.model.head.parameters(), lr=0.1)

        def fit(self) -> None:
            for _ in range(3):
                x, y = batch()
                features = self.model.backbone(x)
                h = torch.sigmoid(self.model.head(features))
                h += 1
                F.cross_entropy(h, y).backward()

    with pytest.raises(RuntimeError, match="inplace") as caught, ampcheck.watch(None, emit=[].append, report=False):
        Trainer().fit()
    assert "h = h + 1" in caught.value.__notes__[0]


def test_a_part_that_was_tried_out_first() -> None:
    """The model itself is called after one of its parts was."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    features = model.backbone(torch.ones(1, 8)).shape[1]
    assert features == 8

    def train() -> None:
        assert model.backbone(torch.ones(1, 8)).shape[1] == 8
        for _ in range(3):
            x, y = batch()
            with bf16():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    report = watched(train)
    modules = {row["name"]: row["calls"] for row in report.to_dict()["modules"]}
    assert modules[""] >= 1
    assert "error" not in codes(report).values()


class TestAutocastAroundTheLoss:
    def test_a_loss_module(self) -> None:
        model, criterion = Net(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss() -> torch.Tensor:
            x, y = batch()
            logits = model(x)
            with bf16():
                return criterion(logits, y)

        finding = only(watched(loop(model, optimizer, loss)))
        assert (finding.code, str(finding.severity)) == ("AMP101", "warning")
        assert "only CrossEntropyLoss" in finding.message

    def test_the_forward_too(self) -> None:
        model, criterion = Net(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss() -> torch.Tensor:
            x, y = batch()
            with bf16():
                return criterion(model(x), y)

        assert codes(watched(loop(model, optimizer, loss))) == {}

    def test_a_head_in_float32_is_no_loss(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss() -> torch.Tensor:
            x, y = batch()
            with bf16():
                features = model.backbone(x)
            return F.cross_entropy(model.head(features.float()), y)

        assert codes(watched(loop(model, optimizer, loss))) == {"AMP110": "info"}


class TestOptimizerOfAnother:
    def test_a_deep_copy(self) -> None:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        model = copy.deepcopy(net)
        report = watched(loop(model, optimizer, lambda: F.cross_entropy(model(batch()[0]), batch()[1])))
        assert codes(report) == {"AMP309": "error"}

    def test_a_head_that_was_replaced(self) -> None:
        model = Net(10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.head = nn.Linear(8, 3)
        finding = only(watched(loop(model, optimizer, lambda: F.cross_entropy(model(batch()[0]), batch()[1]))))
        assert (finding.code, str(finding.severity)) == ("AMP309", "warning")
        assert finding.evidence["missing"] == ["head.weight", "head.bias"]

    def test_a_head_alone_is_trained(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        report = watched(loop(model, optimizer, lambda: F.cross_entropy(model(batch()[0]), batch()[1])))
        assert codes(report) == {}

    def test_two_networks_with_an_optimizer_each(self) -> None:
        generator, critic = nn.Linear(8, 8), nn.Linear(8, 8)
        of_generator = torch.optim.SGD(generator.parameters(), lr=0.1)
        of_critic = torch.optim.SGD(critic.parameters(), lr=0.1)

        def train() -> None:
            for _ in range(3):
                fake = generator(batch()[0])
                of_critic.zero_grad()
                critic(fake.detach()).mean().backward()
                of_critic.step()
                of_generator.zero_grad()
                critic(fake).mean().backward()
                of_generator.step()

        assert codes(watched(train)) == {}


def test_parameters_of_a_second_network_are_clipped_before_backward() -> None:
    """A replay finds them clipped already; what the clip did was seen in the step."""
    torch.manual_seed(0)
    generator = nn.Linear(4, 8)
    critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def train(clips: float) -> Report:
        def steps() -> None:
            for _ in range(3):
                of_critic.zero_grad()
                fake = generator(torch.randn(4, 4)).detach()
                loss = critic(fake).mean() - critic(torch.randn(4, 8)).mean()
                for parameter in critic.parameters():
                    parameter.data.clamp_(-clips, clips)
                loss.backward()
                of_critic.step()
                of_generator.zero_grad()
                (-critic(generator(torch.randn(4, 4))).mean()).backward()
                of_generator.step()

        return watched(steps)

    finding = only(train(0.01))
    assert finding.code == "AMP402"
    assert "Sequential.2.weight" in finding.message
    assert "clamp_" in {site.op and site.op.removeprefix("aten::") for site in finding.sites}
    assert finding.fix.startswith("Move the write to Sequential.2.weight")
    assert finding.edit is None
    # A clip that changes nothing does no harm.
    assert codes(train(1e6)) == {}


def test_precision_that_changes_from_step_to_step_is_no_fault() -> None:
    """The step that fails runs without autocast on purpose: what its replay shows of that is not held against it."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = ampcheck.watch(model, optimizer=optimizer, emit=[].append, report=False)

    def train() -> None:
        with watch:
            for step in range(6):
                x, y = batch()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 0):
                    h = torch.sigmoid(model(x))
                    if step == 3:
                        h += 1
                    loss = F.cross_entropy(h, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train()
    assert watch.report is not None
    assert only(watch.report).code == "AMP401"


OUTSIDE = """
import torch
from torch import nn

model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 4))
    out.float().sum().backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    model(out)
"""


def said(source: str, folder: Path) -> str:
    script = folder / "train.py"
    script.write_text(source)
    command = [sys.executable, "-m", "ampcheck", "run", str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200).stderr


def test_what_called_the_script_is_no_part_of_it(tmp_path: Path) -> None:
    """The command line's own `with` blocks hide nothing: no region is around the line that fails."""
    assert "Autocast did not cast them: no autocast region surrounds this line." in said(OUTSIDE, tmp_path)


MIXED = """
import torch
from torch import nn

lstm = nn.LSTM(4, 4)
state = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
lstm(torch.randn(3, 2, 4), (state, state))
"""


def test_a_kernel_that_is_missing_for_mixed_dtypes_is_a_mismatch(tmp_path: Path) -> None:
    told = said(MIXED, tmp_path)
    assert "error[AMP203] dtype-mismatch" in told
    assert "AMP207" not in told
