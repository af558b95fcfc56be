"""Exceptions that the program catches itself, child processes, and notebooks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HEAD = """
import concurrent.futures, contextlib, copy, logging, multiprocessing, os, sys, threading
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, bad=True):
        super().__init__()
        self.body, self.head, self.bad = nn.Linear(8, 16), nn.Linear(16, 4), bad

    def forward(self, x):
        h = torch.sigmoid(self.body(x))
        if self.bad:
            h *= 2
        return self.head(h)

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4).bfloat16()

    def forward(self, x):
        return self.b(self.a(x))

def batch():
    return torch.randn(4, 8), torch.randint(4, (4,))

def fit(model, steps=3):
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def work(rank, bad=True):
    fit(Net(bad))

def step(model):
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
"""


class Ran(NamedTuple):
    status: int
    said: str
    report: dict[str, Any] | None

    @property
    def codes(self) -> dict[str, str]:
        assert self.report is not None
        return {finding["code"]: finding["severity"] for finding in self.report["findings"]}


def run(tmp_path: Path, program: str, *options: str) -> Ran:
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text(HEAD + program)
    command = [sys.executable, "-m", "ampcheck", "run", "--json", str(report), *options, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    return Ran(done.returncode, done.stdout + done.stderr, json.loads(report.read_text()) if report.exists() else None)


CAUGHT = {
    "loop goes on": """
for _ in range(4):
    try:
        step(Net())
    except RuntimeError as error:
        print(type(error).__name__)
""",
    "only later": """
model = Net(bad=False)
fit(model)
model.bad = True
for _ in range(3):
    with contextlib.suppress(RuntimeError):
        step(model)
""",
    "logged": """
model = Net()
for _ in range(3):
    try:
        step(model)
    except Exception:
        logging.exception("step failed")
""",
    "in a thread": """
thread = threading.Thread(target=fit, args=(Net(),))
thread.start()
thread.join()
""",
    "in a pool's thread": """
with concurrent.futures.ThreadPoolExecutor(1) as pool:
    concurrent.futures.wait([pool.submit(fit, Net())])
""",
    "by callbacks": """
class Loop:
    def fire(self, callbacks, *args):
        for callback in callbacks:
            try:
                callback(*args)
            except Exception as error:
                print("callback failed")

model = Net()
for _ in range(3):
    Loop().fire([step], model)
""",
}


@pytest.mark.parametrize("program", CAUGHT.values(), ids=CAUGHT)
def test_what_the_program_catches_is_said_once(program: str, tmp_path: Path) -> None:
    ran = run(tmp_path, program)
    assert ran.status == 0
    assert ran.codes == {"AMP401": "error"}
    assert ran.said.count("error[AMP401]") == 1 or sys.version_info < (3, 11)
    assert "Write `h = h * 2` at train.py:" in ran.said
    assert "AMP900" not in ran.said


def test_a_forward_that_fails_in_every_step(tmp_path: Path) -> None:
    ran = run(
        tmp_path,
        """
model, skipped = Mixed(), 0
for _ in range(4):
    x, y = batch()
    try:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    except Exception:
        skipped += 1
        continue
print(skipped)
""",
    )
    assert ran.codes == {"AMP203": "error"}
    assert ran.said.count("error[AMP203]") == 1 or sys.version_info < (3, 11)


def test_what_is_raised_again_carries_its_note(tmp_path: Path) -> None:
    ran = run(
        tmp_path,
        """
model = Net()
for attempt in range(3):
    try:
        step(model)
    except RuntimeError:
        if attempt == 2:
            raise
""",
    )
    assert ran.status == 1
    assert "error[AMP401]" in ran.said.partition("Traceback")[2] or sys.version_info < (3, 11)
    assert ran.codes == {"AMP401": "error"}


def test_fail_on_holds_for_what_is_caught(tmp_path: Path) -> None:
    assert run(tmp_path, CAUGHT["loop goes on"], "--fail-on", "error").status == 3


HEALTHY = {
    "a dtype that is tried out": """
model = Net(bad=False)
try:
    model(torch.randn(2, 8).double())
except RuntimeError:
    pass
fit(model)
""",
    "another way where the first fails": """
model = Net(bad=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for index in range(4):
    x, y = batch()
    try:
        out = model(x.double() if index % 2 else x)
    except RuntimeError:
        out = model(x)
    optimizer.zero_grad()
    F.cross_entropy(out, y).backward()
    optimizer.step()
""",
    "inside a module": """
class Either(nn.Module):
    def __init__(self):
        super().__init__()
        self.fast, self.slow = Mixed(), Net(bad=False)

    def forward(self, x):
        try:
            return self.fast(x)
        except RuntimeError:
            return self.slow(x)

model = Either()
model.fast.b.requires_grad_(False)
fit(model)
""",
    "out of memory": """
class Large(Net):
    def forward(self, x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().forward(x)

model = Large(bad=False)
for _ in range(3):
    try:
        step(model)
    except torch.OutOfMemoryError:
        F.cross_entropy(model(torch.ones(2, 8)), torch.tensor([0, 1])).backward()
""",
    "an error of the program's own": """
class Picky(Net):
    def forward(self, x):
        if x[0, 0] > 0:
            raise RuntimeError("label out of range")
        return super().forward(x)

model = Picky(bad=False)
for _ in range(6):
    with contextlib.suppress(RuntimeError):
        step(model)
""",
}


@pytest.mark.parametrize("program", HEALTHY.values(), ids=HEALTHY)
def test_what_is_handled_is_no_fault(program: str, tmp_path: Path) -> None:
    ran = run(tmp_path, program)
    assert ran.status == 0
    assert "error" not in ran.codes.values()
    assert "error[" not in ran.said


GUARDED = """
if __name__ == "__main__":
    {}
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_process_is_watched(method: str, tmp_path: Path) -> None:
    start = f'process = multiprocessing.get_context("{method}").Process(target=work, args=(0,)); process.start()'
    ran = run(tmp_path, GUARDED.format(f"{start}; process.join()"))
    assert ran.status == 0
    assert ran.codes == {"AMP401": "error"}
    assert ran.said.count("error[AMP401]") == 1 or sys.version_info < (3, 11)
    assert "Write `h = h * 2` at train.py:" in ran.said
    assert "children.py" not in ran.said
    child = json.loads((tmp_path / "report.0.json").read_text())
    assert child["failure"]["type"] == "RuntimeError"


def test_what_spawn_raises_tells_what_the_child_knows(tmp_path: Path) -> None:
    ran = run(tmp_path, GUARDED.format("mp.spawn(work, nprocs=2)"))
    assert ran.status == 1
    assert ran.codes == {"AMP401": "error"}
    assert "Write `h = h * 2` at train.py:" in ran.said


def test_healthy_children_and_the_workers_of_a_loader(tmp_path: Path) -> None:
    loader = "list(torch.utils.data.DataLoader(torch.arange(8), 4, num_workers=2))"
    ran = run(tmp_path, GUARDED.format(f"mp.spawn(work, args=(False,), nprocs=2); {loader}"))
    assert ran.status == 0
    assert ran.codes == {}
    assert "2 child processes were watched" in ran.said
    assert not (tmp_path / "report.2.json").exists()
    assert ran.report is not None
    assert ran.report["modules"]


def test_a_program_that_leaves_at_once_says_what_was_seen(tmp_path: Path) -> None:
    ran = run(tmp_path, "print('leaving', flush=True)\nos._exit(7)\n")
    assert ran.status == 7
    assert "nothing was judged: no training call of a module was seen" in ran.said
    assert ran.report is not None


CELLS = (
    """import torch, ampcheck
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
    def forward(self, x):
        h = torch.sigmoid(self.a(x))
        h += 1
        return h
model = Net()""",
    """with ampcheck.watch(model):
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()""",
)


def test_a_notebook_names_cells_and_lines() -> None:
    pytest.importorskip("IPython")
    program = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="NoColor")
for cell in {CELLS!r}:
    shell.run_cell(cell, store_history=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert said.count("error[AMP401]") == 1
    assert "Cell In[1]\n" in said
    assert "Write `h = h + 1` at Cell In[1], line 9." in said
