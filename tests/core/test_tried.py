"""Remedies that were tried on the failing batch: what a finding says of them is true."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

import ampcheck

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
"""
LOOP = """
model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    loss = model(torch.randn(4, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.out, self.act = nn.Linear(8, 8), nn.Linear(8, 2), nn.ReLU(inplace=True)

    def forward(self, x):
{forward}
"""
FORWARDS = {
    "augmented": "h = torch.sigmoid(self.fc(x))\nh *= 2\nreturn self.out(h)",
    "method": "h = self.fc(x).exp()\nh.clamp_(max=3)\nreturn self.out(h)",
    "chain": "h = self.fc(x).exp()\nreturn self.out(h.mul_(2).add_(1))",
    "index": "h = self.fc(x).tanh()\nh[:, 0] = 0\nreturn self.out(h)",
    "row of a list": "hs = [self.fc(x).tanh() for _ in range(2)]\nhs[1] += hs[0]\nreturn self.out(hs[1])",
    "function": "h = torch.sigmoid(self.fc(x))\nF.dropout(h, 0.5, inplace=True)\nreturn self.out(h)",
    "two names": "h = torch.sigmoid(self.fc(x))\ny = F.relu(h, inplace=True)\nreturn self.out(y) + self.out(h)",
    "out": "h = torch.sigmoid(self.fc(x))\nwith torch.no_grad():\n    torch.mul(h, 2, out=h)\nreturn self.out(h)",
    "copy": "h = torch.sigmoid(self.fc(x))\nh.copy_(x)\nreturn self.out(h)",
    "view": "h = torch.sigmoid(self.fc(x))\nh.view(-1).mul_(2)\nreturn self.out(h)",
    "module": "h = torch.sigmoid(self.fc(x))\nh = self.act(h)\nreturn self.out(h)",
    "argument": "return self.out(self.more(torch.tanh(self.fc(x))))\n\ndef more(self, h):\n    h += 1\n    return h",
    "fresh": "h = torch.sigmoid(self.fc(x)).mul_(2)\nreturn self.out(h)",
    "slice": "h = torch.sigmoid(self.fc(x))\nh[:] *= 2\nreturn self.out(h)",
    "not a number": "h = torch.sigmoid(self.fc(x))\nh *= float('nan')\nreturn self.out(h)",
    "views": "a, b = self.fc(x).chunk(2, dim=1)\na *= b\nreturn self.out(torch.cat([a, b], 1))",
}


def failing(forward: str) -> str:
    return HEAD + NET.format(forward=textwrap.indent(forward, " " * 8).replace("\n        def ", "\n    def ")) + LOOP


def run(source: str, file: Path) -> tuple[Exception | None, dict[str, Any], ampcheck.Report | None]:
    file.write_text(source)
    names: dict[str, Any] = {"__name__": "program"}
    watch = ampcheck.watch(None, emit=[].append, report=False, numerics="off")
    try:
        with watch:
            exec(compile(source, str(file), "exec"), names)
    except RuntimeError as error:
        return error, names, watch.report
    return None, names, watch.report


@pytest.mark.parametrize("name", FORWARDS)
def test_the_edit_is_tried_and_trains(name: str, tmp_path: Path) -> None:
    source = failing(FORWARDS[name])
    error, _, report = run(source, tmp_path / "program.py")
    assert error is not None
    assert report is not None
    (finding,) = [one for one in report.findings if one.code in ("AMP401", "AMP404")]
    assert finding.edit is not None
    # Of a failure in forward there is no loss to compare.
    tried = finding.code == "AMP401"
    assert finding.tried is (True if tried else None), finding
    assert ("Tried on this batch: the step then runs." in getattr(error, "__notes__", [""])[0]) is tried
    assert report.to_dict()["findings"][0].get("tried", False) is tried

    lines = source.splitlines()
    stands = lines[finding.edit.line - 1]
    assert stands.strip() == finding.edit.before
    indent = stands[: len(stands) - len(stands.lstrip())]
    lines[finding.edit.line - 1] = "\n".join(indent + one for one in finding.edit.after.split("\n"))
    fixed, names, report = run("\n".join(lines), tmp_path / "repaired.py")
    assert fixed is None
    assert report is not None
    assert report.findings == ()
    assert names["step"] == 2


def test_a_remedy_that_does_not_help_is_not_printed(tmp_path: Path) -> None:
    """The line that is named first is not the only one that writes."""
    forward = "h = torch.sigmoid(self.fc(x))\nkept = h\nh *= 2\nkept += 1\nreturn self.out(h)"
    error, _, report = run(failing(forward), tmp_path / "program.py")
    assert error is not None
    assert report is not None
    finding = report.findings[0]
    assert finding.code == "AMP401"
    assert finding.tried is False
    assert finding.fix == next(rule.fix for rule in ampcheck.RULES if rule.code == "AMP401")
    assert finding.edit is None
    assert "h = h * 2" not in getattr(error, "__notes__", [""])[0]


def test_functions_run_as_they_stand_afterwards(tmp_path: Path) -> None:
    error, names, _ = run(failing(FORWARDS["augmented"]), tmp_path / "program.py")
    assert error is not None
    import torch

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        names["Net"]()(torch.ones(2, 8)).sum().backward()


LOST = {
    "the loop's own name": "hs = [self.fc(x).exp()]\nfor h in hs:\n    h *= 1.001\nreturn self.out(hs[0])",
    "a helper's argument": "h = self.fc(x).exp()\nself.noise(h)\nreturn self.out(h)\n\ndef noise(self, h):\n    h += 1",
    "an item": "hs = [self.fc(x).exp()]\nh = hs[0]\nh *= 1.001\nreturn self.out(hs[0])",
}


@pytest.mark.parametrize("name", LOST)
def test_an_edit_that_undoes_what_the_write_was_for_is_not_printed(name: str, tmp_path: Path) -> None:
    error, _, report = run(failing(LOST[name]), tmp_path / "program.py")
    assert error is not None
    assert report is not None
    finding = report.findings[0]
    assert finding.code == "AMP401"
    assert finding.edit is None
    assert finding.fix == next(rule.fix for rule in ampcheck.RULES if rule.code == "AMP401")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("helps", [True, False])
def test_a_branch_taken_at_random_is_tried_as_it_was_taken(helps: bool, seed: int, tmp_path: Path) -> None:
    """The step fails under some random numbers only: with those the edit is tried."""
    write = "h *= 2" if helps else "kept = h; h *= 2; kept += 0"
    forward = f"h = torch.sigmoid(self.fc(x))\nif torch.rand(()) < 0.4:\n    {write}\nreturn self.out(h)"
    source = (
        failing(forward).replace("torch.manual_seed(0)", f"torch.manual_seed({seed})").replace("range(3)", "range(30)")
    )
    error, _, report = run(source, tmp_path / "program.py")
    assert error is not None
    assert report is not None
    finding = report.findings[0]
    assert finding.code == "AMP401"
    if helps:
        assert finding.tried in (True, None)
        assert finding.edit is not None
    else:
        assert finding.tried is not True
