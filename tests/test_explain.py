"""What `ampcheck explain` shows is run: each page's example has the rule's finding, and what to use instead has not."""

from __future__ import annotations

import copy
import gc
import linecache
import math
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import ampcheck
from ampcheck import AmpChecker, Precision
from ampcheck.rules import RULES
from ampcheck.rules.rule import Severity

NOT_RUN = {
    "AMP107": "whether a dtype is native is the machine's matter",
    "AMP109": "needs CUDA, and a PyTorch that has the fault",
    "AMP307": "a collapse takes more steps than are watched; see tests/rules",
    "AMP308": "refused by a host's precision plugin; see tests/failure",
    "AMP407": "two processes that broadcast buffers; see tests/inplace",
    "AMP511": "batches that break statistics; see tests/core/test_numbers.py",
    "AMP512": "many steps; see tests/core/test_numbers.py",
    "AMP515": "weights that grow; see tests/core/test_numbers.py",
    "AMP601": "a trace of a module; see tests/export",
    "AMP111": "a sharded model; see tests/distributed",
    "AMP602": "a compiled extension; see tests/export",
    "AMP603": "a trace of a function; see tests/export",
    "AMP604": "a trace; see tests/export",
    "AMP605": "an export; see tests/export",
    "AMP900": "an error of AmpCheck's own, in place of a program",
}


@dataclass(frozen=True)
class Scene:
    """The program around an example, which stands where ``EXAMPLE`` does. ``instead`` is the program around what to
    use instead, where it is another; ``attached``: what is judged is seen without a step. ``setup`` comes before the
    step that is watched as a host does, where `ampcheck.watch` would end it at the first optimizer step. ``warns``: the
    finding is about what stays so; the repair removes a warning. ``numbers``: what is found are numbers."""

    program: str
    instead: str | None = None
    precision: Precision | None = None
    attached: bool = False
    setup: str | None = None
    warns: bool = False
    numbers: bool = False


def module(forward: str, init: str = "") -> str:
    """A program that trains a module with these bodies in one step under autocast bfloat16."""
    return (
        "class Module(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        f"{textwrap.indent(init, ' ' * 8)}\n"
        "    def forward(self, x):\n"
        f"{textwrap.indent(forward, ' ' * 8)}\n"
        "model = Module()\n"
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    loss = model(torch.ones(4, 4)).float().square().mean()\n"
        "loss.backward()\n"
    )


AUTOCAST = "with torch.autocast('cpu', dtype=torch.float16):\n    loss = criterion(model(images), labels)\n"
SCALER = "scaler = torch.amp.GradScaler('cpu')\n"
STEP = "scaler.step(optimizer)\nscaler.update()\n"
SCALED = f"{SCALER}{AUTOCAST}EXAMPLE\n"
SMALL = (
    "class Net(nn.Sequential):\n    def __init__(self):\n        super().__init__(nn.Linear(4, 4), nn.Linear(4, 10))\n"
    "x, y = torch.ones(4, 4), labels\n"
)

SCENES = {
    "AMP101": Scene(f"{SCALER}EXAMPLE\n{STEP}"),
    "AMP102": Scene("EXAMPLE\nloss.backward()"),
    "AMP103": Scene("EXAMPLE\nloss.backward()"),
    "AMP104": Scene("EXAMPLE\nloss.backward()", precision=Precision("mixed", "cpu", "float16", False, "config.dtype")),
    "AMP105": Scene("EXAMPLE", instead=f"{AUTOCAST}loss.backward()\noptimizer.step()\nEXAMPLE"),
    "AMP106": Scene("EXAMPLE"),
    "AMP108": Scene("EXAMPLE\nloss.backward()"),
    "AMP110": Scene(
        module(
            "backbone, head, images = self.stem, self.head, x\nwith torch.autocast('cpu', enabled=False):\n    pass\n"
            "EXAMPLE\nreturn logits"
        ).replace("with torch.autocast('cpu', dtype=torch.bfloat16):", "if True:")
    ),
    "AMP201": Scene(
        f"EXAMPLE\noptimizer = torch.optim.SGD(model.parameters(), 0.1)\n{AUTOCAST}"
        f"scaler.scale(loss).backward()\n{STEP}"
    ),
    "AMP202": Scene(
        "conv = model[0]\nEXAMPLE\nwith torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    loss = criterion(model(images), labels)\nloss.backward()"
    ),
    "AMP203": Scene(module("EXAMPLE")),
    "AMP204": Scene(
        module("return self.head(self.stem(x[:, :3] - self.mean))", "self.stem = nn.Linear(3, 4)\nEXAMPLE")
    ),
    "AMP205": Scene("EXAMPLE\n" + module("return Scatter.apply(self.stem(x)[:, :2], torch.arange(4))")),
    "AMP206": Scene(
        "@torch.library.custom_op('mylib::pool', mutates_args=())\n"
        "def pool(x: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:\n"
        "    return torch.zeros(len(x), 4).addmm_(x, rois)\n"
        + module("rois = torch.ones(4, 4)\nself.conv = self.stem\nEXAMPLE\nreturn y.detach() + self.conv(x)")
    ),
    "AMP207": Scene(
        module(
            "boxes, targets = self.head(x).detach().half(), torch.ones(2, 4).half()\n"
            "with torch.autocast('cpu', enabled=False):\n    EXAMPLE\nreturn self.head(x)"
        )
    ),
    "AMP208": Scene(
        module(
            "x = self.stem(x)[None]\nEXAMPLE\nreturn self.head(x)", "self.cls_token = nn.Parameter(torch.ones(1, 1, 4))"
        )
    ),
    "AMP209": Scene(module("mask = torch.ones(4, dtype=torch.bool)\nEXAMPLE\nreturn out")),
    "AMP210": Scene("labels = torch.ones(4, 10)\nEXAMPLE\nloss.backward()"),
    "AMP211": Scene("EXAMPLE", attached=True),
    "AMP212": Scene(
        "with torch.autocast('cpu', dtype=torch.bfloat16):\n    EXAMPLE\n    loss = model(images).sum()\n"
        "loss.backward()"
    ),
    "AMP301": Scene("EXAMPLE", instead=SCALED),
    "AMP302": Scene("EXAMPLE\nscaler.scale(loss).backward()", instead="EXAMPLE"),
    "AMP303": Scene(
        f"EXAMPLE\noptimizer = torch.optim.SGD(model.parameters(), 0.1)\n{AUTOCAST}"
        f"scaler.scale(loss).backward()\n{STEP}"
    ),
    "AMP304": Scene(f"{SCALER}EXAMPLE"),
    "AMP305": Scene(SCALED + "scaler.update()"),
    "AMP306": Scene(
        f"{SCALER}for bad in (True, False):\n"
        f"{textwrap.indent(AUTOCAST, '    ')}"
        "    scaler.scale(loss * (float('nan') if bad else 1)).backward()\n    EXAMPLE\n"
    ),
    "AMP309": Scene("EXAMPLE", attached=True),
    "AMP310": Scene(
        f"{SCALER}scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)\n{AUTOCAST}"
        "scaler.scale(loss * float('inf')).backward()\nEXAMPLE",
        warns=True,
    ),
    "AMP311": Scene(
        f"{SCALER}{AUTOCAST}scaler.scale(loss).backward()\nloss = model[0].weight.square().mean()\n"
        "EXAMPLE\nscaler.update()"
    ),
    "AMP312": Scene(f"EXAMPLE\n{AUTOCAST}scaler.scale(loss).backward()\n{STEP}"),
    "AMP401": Scene(module("EXAMPLE\nreturn x", "self.norm, self.p = nn.LayerNorm(4), 0.5")),
    "AMP402": Scene(module("scores = self.stem(x)\nmask = torch.eye(4, dtype=torch.bool)\nEXAMPLE\nreturn attention")),
    "AMP403": Scene("lr = 0.1\nloss = criterion(model(images), labels)\nloss.backward()\nEXAMPLE"),
    "AMP404": Scene(module("x = self.stem(x)\nEXAMPLE\nreturn gate")),
    "AMP405": Scene(
        "EXAMPLE",
        setup="noise = torch.ones(4, 4)\n"
        "class Gan(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.generator = nn.Linear(4, 4)\n"
        "        self.discriminator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))\n"
        "    def forward(self, x):\n"
        "        return self.discriminator(x).mean()\n"
        "model = Gan()\ngenerator, discriminator = model.generator, model.discriminator\n"
        "optimizer_d = torch.optim.SGD(discriminator.parameters(), lr=0.1)\n"
        "loss_g = lambda fake: fake.mean()\n"
        "loss_d = model(noise)\n",
    ),
    "AMP406": Scene(module("backbone, head, images = self.stem, self.head, x\nEXAMPLE\nreturn loss")),
    "AMP408": Scene(
        "cell, state, loss = nn.GRUCell(4, 4), torch.zeros(4, 4), lambda state: state.square().sum()\n"
        "for x in torch.ones(3, 4, 4):\n    EXAMPLE\n"
    ),
    "AMP409": Scene("x = images\nEXAMPLE\nloss.backward()"),
    "AMP501": Scene("output = model(images) * 100\nEXAMPLE\nloss.backward()", numbers=True),
    "AMP502": Scene(
        module("q = k = self.stem(x)[None] * 0 + 150\nd = 4\nEXAMPLE\nreturn scores.softmax(-1)").replace(
            "torch.bfloat16", "torch.float16"
        ),
        numbers=True,
    ),
    "AMP503": Scene(
        module("x = self.stem(x).relu() * 0\nEXAMPLE\nreturn x").replace("torch.bfloat16", "torch.float16"),
        numbers=True,
    ),
    "AMP504": Scene("a = model(images)\nb = a.detach()\nEXAMPLE\nloss = distance.sum()\nloss.backward()", numbers=True),
    "AMP505": Scene(
        module("scores = self.stem(x)\nmask = torch.ones(4, 4).bool()\nEXAMPLE\nreturn scores"), numbers=True
    ),
    "AMP506": Scene(
        module("x = self.stem(x)\nx = x / x.abs().amax().detach()\nEXAMPLE\nreturn self.last(x)")
        .replace("torch.bfloat16", "torch.float16")
        .replace("self.stem, self.head =", "self.last = nn.Identity()\n        self.stem, self.head =")
        .replace(".float().square().mean()", ".float().mean()"),
    ),
    "AMP507": Scene(
        f"EXAMPLE\n{AUTOCAST}loss = loss * 1e-4\nscaler.scale(loss).backward()\n{STEP}",
    ),
    "AMP508": Scene(
        f"{SMALL}EXAMPLE\nloss = criterion(model(x.bfloat16()).float(), y)\nloss.backward()\noptimizer.step()",
        instead=f"{SMALL}EXAMPLE\nloss.backward()\noptimizer.step()",
    ),
    "AMP509": Scene("EXAMPLE\nloss = model(images.half()).float().square().mean()\nloss.backward()"),
    "AMP510": Scene("x, y = images.clone(), labels\nEXAMPLE\nloss.backward()", numbers=True),
    "AMP410": Scene(
        "hook = lambda module, inputs, outputs: None\nEXAMPLE\nloss = net(torch.ones(2, 3, 8, 8)).sum()\n"
        "loss.backward()"
    ),
}


def parts(page: str) -> tuple[str, str]:
    """The example of a page, and what to use instead."""
    codes = [
        textwrap.dedent(code)
        for heading in ("Example", "Use instead")
        for code in re.findall(rf"^{heading}\n\s+```python\n(.*?)\n\s*```", page, re.DOTALL | re.MULTILINE)
    ]
    example, instead = codes
    return example, instead


def placed(example: str, program: str) -> str:
    """``program`` with ``example`` in the place of ``EXAMPLE``, indented as that is."""
    return re.sub(r"^( *)EXAMPLE$", lambda match: textwrap.indent(example, match[1]), program, flags=re.MULTILINE)


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_others() -> Iterator[None]:
    """What other tests left alive is none of the examples' optimizers and scalers, and costs no time; and what they
    compiled is no reason to watch less."""
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def names() -> dict[str, Any]:
    """What the examples take for granted."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    class Config:
        dtype = "float32"

    model = Net()
    return {
        "torch": torch,
        "math": math,
        "nn": nn,
        "F": F,
        "numpy": numpy,
        "copy": copy,
        "ampcheck": ampcheck,
        "clip_grad_norm_": clip_grad_norm_,
        "saved_tensors_hooks": saved_tensors_hooks,
        "Net": Net,
        "config": Config(),
        "device": "cpu",
        "criterion": nn.CrossEntropyLoss(),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "images": torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8),
        "labels": torch.arange(4),
    }


def run(program: str, names: dict[str, Any]) -> None:
    exec(compile(program, "<example>", "exec", dont_inherit=True), names)


def findings(program: str, scene: Scene, names: dict[str, Any]) -> tuple[dict[str, Severity], Exception | None]:
    """What is found in ``program``, and what it raised."""
    gc.collect()
    checker = AmpChecker(report=False, ignore="AMP107", numerics="guard" if scene.numbers else "free")
    if scene.numbers:
        # What is not finite is explained by running its statements again, from their source.
        linecache.cache["<example>"] = (len(program), None, program.splitlines(keepends=True), "<example>")
    names["model"].zero_grad()
    raised: Exception | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error" if scene.warns else "ignore", UserWarning)
        if scene.attached:
            run(program, names)
            held = {"averaged": names.get("averaged"), "optimizers": (names["optimizer"],)}
            checker.attach(names["model"], **held, emit=lambda text: None)
        elif scene.setup is not None:
            run(scene.setup, names)
            checker.attach(names["model"], emit=lambda text: None)
            try:
                with checker.training_step():
                    run(program, names)
            except RuntimeError as error:
                raised = error
                checker.diagnose(error)
        else:
            watch = ampcheck.watch(None, checker=checker, precision=scene.precision, emit=lambda text: None)
            try:
                with watch:
                    run(program, names)
            except Exception as error:  # noqa: BLE001 (an example may crash: that is what its page is about)
                raised = error
    assert checker.report is not None
    assert checker.report.trace.internal_error is None, checker.report.trace.internal_error
    return {finding.code: finding.severity for finding in checker.report.findings}, raised


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.code in SCENES], ids=lambda rule: rule.code)
def test_example_has_the_finding_and_its_repair_has_not(rule: Any, names: dict[str, Any]) -> None:
    if rule.code == "AMP409" and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this PyTorch does not tell which hooks are in place")
    scene = SCENES[rule.code]
    example, instead = parts(rule.page)
    # The GPU of an example becomes the CPU, where the page is not about another device.
    if rule.code != "AMP103":
        example, instead = example.replace("cuda", "cpu"), instead.replace("cuda", "cpu")

    found, raised = findings(placed(example, scene.program), scene, dict(names))
    assert rule.code in found
    assert isinstance(raised, UserWarning) is scene.warns

    found, raised = findings(placed(instead, scene.instead or scene.program), scene, dict(names))
    assert raised is None
    assert rule.code not in found or scene.warns
    assert Severity.ERROR not in found.values(), found


def test_every_page_is_run_or_listed() -> None:
    assert SCENES.keys() | NOT_RUN.keys() == {rule.code for rule in RULES}
    assert not SCENES.keys() & NOT_RUN.keys()
    assert len(SCENES) >= 20
