"""Programs that a checker breaks, hangs on, or trusts too much."""

from __future__ import annotations

import gc
import itertools
import json
import os
import queue
import random
import stat
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from loops import CNN, same, sgd, traces_left, train
from torch import Tensor, nn
from torch.nn import functional as F

import ampcheck

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def watching(model: nn.Module | None, said: list[str] | None = None, **options: Any) -> ampcheck.watch:
    options = {"report": False, "ignore": "AMP107", **options}
    return ampcheck.watch(model, emit=(said if said is not None else []).append, **options)


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120, check=False)


# What the model is given and gives.


class Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, node: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {"x": self.linear(node["x"])}
        out["self"] = [out, node]
        return out


def test_a_batch_and_an_output_that_hold_themselves() -> None:
    batch: dict[str, Any] = {"x": X, "parent": None}
    batch["parent"] = [batch]
    model = Tree()
    with watching(model) as watch:
        for _ in range(2):
            model(batch)["x"].sum().backward()
    assert watch.report is not None
    assert watch.report.trace.training.calls
    assert watch.report.findings == ()


def test_strided_nested_tensors() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, rows: list[Tensor]) -> Tensor:
            nested = torch.nested.as_nested_tensor([self.linear(row) for row in rows])
            _ = nested.data
            return nested.to_padded_tensor(0.0).sum()

    model = Ragged()
    with watching(model) as watch:
        model([X[:3], X[:2]]).backward()
    assert watch.report is not None
    assert watch.report.findings == ()


def test_ops_that_count_no_versions() -> None:
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.quantize = FusedMovingAvgObsFakeQuantize()

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return (x / self.quantize.scale).sum() + self.quantize(x).sum()

    model = Quantized()
    with watching(model):
        model(X).backward()
    assert model.quantize.scale._version == 0


# Watches beside and inside one another.


def test_watches_inside_one_another() -> None:
    model = CNN()
    optimizer = sgd(model)
    before = traces_left()
    with watching(model) as outer:
        with watching(model) as inner:
            train(model, optimizer)
        train(model, optimizer)
    assert traces_left() == before
    for watch in (outer, inner):
        assert watch.report is not None
        assert watch.report.trace.training.calls


def test_watches_that_overlap() -> None:
    def training(model: nn.Module) -> Any:
        optimizer = sgd(model)
        with watching(model) as watch:
            for _ in range(3):
                loss = model(X).sum()
                yield
                loss.backward()
                yield
                optimizer.step()
        assert watch.report is not None
        assert watch.report.findings == ()

    before = traces_left()
    running = [training(nn.Linear(8, 4)) for _ in range(3)]
    while running:
        running = [one for one in running if next(one, "over") != "over"]
    assert traces_left() == before


def test_a_script_that_watches_itself_under_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch, ampcheck\n"
        "model = torch.nn.Linear(8, 4)\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "own = torch.autocast.__enter__.__code__\n"
        "with ampcheck.watch(model, report=False):\n"
        "    for _ in range(3):\n"
        "        model(torch.ones(2, 8)).sum().backward()\n"
        "        optimizer.step()\n"
        "print(torch.autocast.__enter__.__code__.co_filename)\n"
    )
    done = run("-m", "ampcheck", "run", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(b"autocast_mode.py")


def test_the_watch_lets_go_of_what_it_watched() -> None:
    model = nn.Linear(8, 4)
    optimizer = sgd(model)
    references = weakref.ref(model), weakref.ref(optimizer)
    with watching(model, optimizer=optimizer) as watch:
        for _ in range(3):
            model(X).sum().backward()
            optimizer.step()
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert watch.report is not None


# What a replay could change.


class Meter:
    total = 0

    def __init__(self) -> None:
        self.total = 0


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Counter:
    calls = 0


LOG: list[int] = []
STATE = {"nested": {"a": [0]}}


class Stateful(nn.Module):
    """Changes all kinds of state, and fails from its third training call on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.meter, self.slotted, self.spaces = Meter(), Slotted(), SimpleNamespace(n=0)
        self.array = np.zeros(2)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.random = random.Random(1)
        self.iterator = enumerate(iter(range(1000)))
        self.steps = itertools.count()
        self.bag = bytearray(b"\0")
        self.seen: set[int] = set()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        Counter.calls += 1
        self.meter.total += 1
        self.slotted.count += 1
        self.spaces.n += 1
        LOG.append(self.calls)
        STATE["nested"]["a"][0] += 1
        self.array += 1
        self.bag[0] += 1
        self.seen.add(self.calls)
        self.drawn = torch.rand(1, generator=self.torch_generator), self.numpy_generator.random(), self.random.random()
        self.at = next(self.iterator), next(self.steps)
        x = self.linear(x).sigmoid()
        if self.calls >= 3:
            x.mul_(2)
        return x.sum()

    def state(self) -> list[Any]:
        drawn = [
            torch.rand(1, generator=self.torch_generator).item(),
            self.numpy_generator.random(),
            self.random.random(),
        ]
        facts = [Counter.calls, self.meter.total, self.slotted.count, self.spaces.n, list(LOG), STATE["nested"]["a"][0]]
        return [
            *facts, self.array.tolist(), bytes(self.bag), sorted(self.seen), self.calls, *drawn, next(self.iterator),
            next(self.steps),
        ]  # fmt: skip


@pytest.mark.parametrize("where", ["loop", "batch"])
def test_a_replay_leaves_the_users_own_state_as_it_was(where: str) -> None:
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        Counter.calls, STATE["nested"]["a"][0] = 0, 0
        LOG.clear()
        model = Stateful()
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(model, emit=lambda _: None)
        with pytest.raises(RuntimeError) as caught:  # noqa: PT012
            for _ in range(4):
                loss = model(X)
                loss.backward()
        if watched:
            checker.diagnose(caught.value, batch=None if where == "loop" else lambda: model(X))  # noqa: B023
            assert "x.mul_(2)" in caught.value.__notes__[0]
        checker.detach()
        states.append(model.state())
    assert states[0] == states[1]
    assert states[0][0] == 3


class Clamped(nn.Module):
    """Sound, and suspicious: the alias that it writes through outlives the save."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.data
        weight.clamp_(-0.4, 0.4)
        return self.linear(x)


def test_a_suspicion_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """The step is replayed, or not at all, while training goes on: other networks, optimizers, scalers, tensors, data
    loaders and files are as without."""

    def step(model: nn.Module, batches: Any) -> Tensor:
        with (tmp_path / "log").open("a") as log:
            log.write("step ")
        return model(next(batches)).square().mean()

    outcomes = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, other, center = Clamped(), nn.Linear(8, 1), torch.zeros(8)
        optimizers = [torch.optim.Adam(one.parameters()) for one in (model, other)]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        loader = torch.utils.data.DataLoader(torch.linspace(-1, 1, 64).reshape(8, 8), batch_size=2)
        (tmp_path / "log").write_text("")
        with watching(model) if watched else torch.enable_grad():
            for x in X.split(1):
                fake = model(x)
                center.add_(1)
                scaler.scale(other(fake).mean() + fake.square().mean()).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
        with watching(model) if watched else torch.enable_grad():
            batches = iter(loader)
            for _ in range(3):
                loss = step(model, batches)
                loss.backward()
        states = [one.state_dict() for one in (model, other, *optimizers, scaler)]
        outcomes.append([states, center, loss.detach(), next(batches), (tmp_path / "log").read_text()])
    assert same(outcomes[0], outcomes[1])
    assert outcomes[0][-1] == "step " * 3


def test_what_waits_for_others_is_not_run_again() -> None:
    waiting: queue.Queue[Tensor] = queue.Queue()
    waiting.put(X)
    model = nn.Linear(8, 4)

    def step() -> Tensor:
        y = model(waiting.get()).sigmoid()
        y.mul_(2)
        return y.sum()

    with pytest.raises(RuntimeError) as caught, watching(model):  # noqa: PT012
        loss = step()
        loss.backward()
    assert "AMP401" in caught.value.__notes__[0]


def test_a_whole_training_is_not_run_again() -> None:
    model, epochs = nn.Linear(8, 4), Mock()

    def fit(model: nn.Module) -> None:
        optimizer = sgd(model)
        for x in X.split(1):
            model(x).sum().backward()
            optimizer.step()
        epochs()

    with pytest.raises(RuntimeError) as caught, watching(model):  # noqa: PT012
        fit(model)
        y = model(X).sigmoid()
        y.mul_(2)
        y.sum().backward()
    assert epochs.call_count == 1
    assert "y.mul_(2)" in caught.value.__notes__[0]


def test_much_memory_seen_by_numpy_is_sampled() -> None:
    model, large = nn.Linear(8, 4), torch.zeros(20_000_000)
    with watching(model):
        loss = model(X).sum()
        started = time.perf_counter()
        for _ in range(20):
            large.numpy()
        loss.backward()
        assert time.perf_counter() - started < 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_not_watched() -> None:
    model = nn.Linear(8, 4)
    before = torch.autograd.backward.__code__
    with watching(model):
        loss = model(X).sum()
        assert torch.autograd.backward.__code__ is not before
        child = os.fork()
        if child == 0:
            os._exit(int(torch.autograd.backward.__code__ is not before))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        loss.backward()


def test_a_loss_outside_the_region_is_not_under_autocast() -> None:
    model = nn.Linear(8, 8)
    with watching(model) as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(X)
        F.binary_cross_entropy(torch.sigmoid(out.float()), torch.ones(4, 8)).backward()
    assert watch.report is not None
    assert "AMP210" not in {finding.code for finding in watch.report.findings}


def test_a_step_that_raises_the_same_object_again_keeps_its_traceback() -> None:
    error = RuntimeError("expected scalar type Float but found Half")

    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            raise error

    model = Raises()
    with pytest.raises(RuntimeError) as caught, watching(model, watch_steps=0):
        model(X)
    depth = len(caught.traceback)
    assert caught.value is error
    assert caught.traceback[-1].name == "forward"
    assert depth < 12


def test_what_tells_or_keeps_is_not_run_twice(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)
    optimizer = sgd(model)
    told: list[float] = []
    saved: list[int] = []

    def log(value: float) -> None:
        told.append(value)

    def save_checkpoint(model: nn.Module, step: int) -> None:
        torch.save(model.state_dict(), tmp_path / f"{step}.pt")
        saved.append(step)

    with pytest.raises(RuntimeError) as caught, watching(model):  # noqa: PT012
        for step in range(5):
            optimizer.zero_grad()
            y = model(X).sigmoid()
            print("computed", file=(tmp_path / "log").open("a"))
            log(y.sum().item())
            save_checkpoint(model, step)
            if step == 3:
                y *= 2
            loss = y.sum()
            loss.backward()
            optimizer.step()
    assert "y *= 2" in caught.value.__notes__[0]
    assert "written here" in caught.value.__notes__[0]
    assert len(told) == 4
    assert saved == [0, 1, 2, 3]
    assert (tmp_path / "log").read_text() == "computed\n" * 4


# Report files.


def report_to(path: Path) -> list[str]:
    said: list[str] = []
    model = nn.Linear(8, 4)
    with watching(model, said, report=path):
        model(X).sum().backward()
    return [line for line in said if "could not be written" in line or "AMP900" in line]


@pytest.fixture
def umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def mode(path: Path) -> str:
    return stat.filemode(path.lstat().st_mode)


def test_a_report_keeps_the_users_umask_and_the_files_mode(tmp_path: Path, umask: None) -> None:
    old = tmp_path / "old.json"
    old.write_text("")
    old.chmod(0o640)
    assert report_to(old) == []
    assert report_to(tmp_path / "new.json") == []
    assert (mode(old), mode(tmp_path / "new.json")) == ("-rw-r-----", "-rw-------")
    assert sorted(os.listdir(tmp_path)) == ["new.json", "old.json"]


def test_a_report_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("")
    link.symlink_to(real)
    assert report_to(link) == []
    assert link.is_symlink()
    assert json.loads(real.read_text())["schema"] == "ampcheck/1"


def test_a_report_is_written_into_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert len(report_to(pipe)) == 1, "nobody reads"
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    model = nn.Linear(8, 4)
    checker = ampcheck.AmpChecker(report=False)
    report = checker.attach(model, emit=lambda _: None)
    assert report is not None
    while not got and reader.is_alive():
        try:
            report.write(pipe)
            break
        except OSError:
            continue
    reader.join(20)
    assert json.loads(got[0])["schema"] == "ampcheck/1"
    assert mode(pipe)[0] == "p"


@pytest.mark.parametrize("name", ["a\x00b", "n" * 300, "."])
def test_a_path_that_is_none_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    (line,) = report_to(tmp_path / name)
    assert "could not be written" in line
    assert "\n" not in line
    assert "AMP900" not in line


def test_the_null_device_stays_one(tmp_path: Path) -> None:
    assert report_to(Path(os.devnull)) == []
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "train.py").write_text("import torch\ntorch.nn.Linear(8, 4)(torch.ones(1, 8)).sum().backward()\n")
    done = run("-m", "ampcheck", "run", "--json", os.devnull, "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


# Options.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report": object()}, "report must be a path"),
        ({"report": None}, "report must be a path"),
        ({"select": 5}, "select takes rule codes"),
        ({"select": ["AMP1", 7]}, "select takes rule codes"),
        ({"ignore": [None]}, "ignore takes rule codes"),
        ({"optimizer": 5}, "optimizer must be of type Optimizer, not int"),
        ({"optimizer": [5]}, "optimizer must be of type Optimizer, not int"),
        ({"scaler": "x"}, "scaler must be of type GradScaler, not str"),
        ({"precision": "bf16"}, "precision must be of type Precision, not str"),
        ({"emit": 5}, "emit must be of type Callable, not int"),
    ],
)
def test_an_option_of_another_type_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        ampcheck.watch(nn.Linear(8, 4), **options)


# Names and source lines.


NASTY = "x\x1b]0;TITLE\x07\x1b[2J[red]\nampcheck  all fine\u202e"


def test_names_cannot_drive_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    class Mixed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.bias.data = self.bias.data.bfloat16()

    model = nn.Sequential(nn.Linear(8, 8))
    model.add_module(NASTY, Mixed())
    with ampcheck.watch(model, report=False):
        model[0](X).sum().backward()
        with pytest.raises(RuntimeError) as caught:
            model(X).sum().backward()
    assert not set("\x1b\x07\u202e") & set("".join(getattr(caught.value, "__notes__", ())))
    said = capfd.readouterr().err
    assert "\\x1b]0;TITLE\\x07" in said
    assert not set("\x1b\x07\u202e") & set(said)
    assert "\nampcheck  all fine" not in said


def test_source_lines_cannot_drive_a_terminal(tmp_path: Path) -> None:
    source = "def write(y):\n    y = y.sigmoid(); y.mul_(2)  # \x1b]0;TITLE\x07\n    return y\n"
    (tmp_path / "lines.py").write_text(source)
    names: dict[str, Any] = {}
    exec(compile(source, str(tmp_path / "lines.py"), "exec"), names)
    model = nn.Linear(8, 4)
    with pytest.raises(RuntimeError) as caught, watching(model):
        names["write"](model(X)).sum().backward()
    note = "\n".join(caught.value.__notes__)
    assert "y.mul_(2)  # \\x1b]0;TITLE\\x07" in note
    assert not {"\x1b", "\x07"} & set(note)


def test_source_in_an_archive_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as archive:
        archive.writestr("archived.py", "def write(y):\n    y = y.sigmoid()\n    y.mul_(2)\n    return y\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code.zip"))
    import archived

    model = nn.Linear(8, 4)
    with pytest.raises(RuntimeError) as caught, watching(model):
        archived.write(model(X)).sum().backward()
    assert "y.mul_(2)" in caught.value.__notes__[0]


COMMANDS = """
import sys
from ampcheck.cli import main
for arguments in (["rules"], ["explain", "AMP401"], ["doctor"]):
    sys.argv = ["ampcheck", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, arguments
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_encoding_of_standard_output(encoding: str, tmp_path: Path) -> None:
    done = run("-c", COMMANDS, cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    of_each = b"autocast-not-active", b"What it does", torch.__version__.encode()
    assert [told for told in of_each if told not in done.stdout] == []


# Ops that other kinds of watching changed.


@pytest.mark.parametrize("name", ["affine grid", "masked fill", "pinverse"])
def test_bits_of_ops(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 24).reshape(4, 2, 3))
            self.value = nn.Parameter(torch.tensor(0.3))
            self.complex = nn.Parameter(torch.complex(X[:3, :3].clone(), X[1:, 3:6].clone()))

        def forward(self) -> Tensor:
            if name == "affine grid":
                return F.affine_grid(self.weight, [4, 1, 5, 5], align_corners=False)
            if name == "masked fill":
                return (self.weight * 3).masked_fill(self.weight > 0, self.value) * self.weight
            return torch.pinverse(self.complex).abs()

    results = []
    for watched in (False, True):
        model = Net()
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(model, emit=lambda _: None)
        with checker.training_step() if watched else torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model()
            out.float().square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
        checker.detach()
    assert same([one for one in results[0] if one is not None], [one for one in results[1] if one is not None])
