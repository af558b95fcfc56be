"""What AmpCheck costs, as a table: ``python benchmarks/cost.py [--rounds N] [--json FILE]``.

Both sides of each ratio run in one process, in turn; the figures are ratios of medians, with the quartiles of the
ratios round by round. Runs on the CPU, and on CUDA where there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import ampcheck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def convolutional() -> tuple[nn.Module, torch.Tensor]:
    def block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    layers = [
        block(3, 32),
        *(block(32, 32) for _ in range(8)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ]
    return nn.Sequential(*layers), torch.randn(16, 3, 32, 32)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)), torch.randn(16, 32, 128)


def many_small_modules(blocks: int = 200) -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(blocks)]
    return nn.Sequential(*layers), torch.randn(8, 16)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "convolutional net": convolutional,
    "transformer": transformer,
    "600 small modules": many_small_modules,
}


class Job:
    """A model with its optimizer, and one plain training step of it under bfloat16 autocast."""

    def __init__(self, made: tuple[nn.Module, torch.Tensor]) -> None:
        self.model, self.x = made[0].to(DEVICE), made[1].to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def step(self) -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = self.model(self.x).float().square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def anomaly_step(self) -> None:
        with torch.autograd.set_detect_anomaly(True):
            self.step()

    def watched_step(self) -> None:
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(self.model, optimizers=[self.optimizer], emit=lambda text: None)
        with checker.training_step():
            self.step()
        assert not checker.watching
        checker.detach()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(a: Callable[[], object], b: Callable[[], object], rounds: int) -> dict[str, float]:
    """Medians of both, and the ratio a/b of the medians with the quartiles of the ratios round by round."""
    for function in (a, b):
        function()
    times = [(seconds(a), seconds(b)) for _ in range(rounds)]
    of_a, of_b = (statistics.median(side) for side in zip(*times, strict=True))
    low, _, high = statistics.quantiles([x / y for x, y in times], n=4)
    return {"ampcheck_ms": of_a * 1e3, "other_ms": of_b * 1e3, "ratio": of_a / of_b, "q1": low, "q3": high}


def fit_start(rounds: int) -> dict[str, float]:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Wrapped(LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

    net, _ = many_small_modules(2500)
    wrapped = Wrapped(net)

    def attach() -> None:
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(wrapped, emit=lambda text: None)
        checker.detach()

    return in_turn(attach, lambda: ModelSummary(wrapped, max_depth=-1), rounds)


def watched_step(name: str, rounds: int) -> dict[str, float]:
    job = Job(MODELS[name]())
    return in_turn(job.watched_step, job.anomaly_step, rounds)


def steady_state(rounds: int) -> dict[str, float]:
    """A loop of 20 steps after its watched step, against the same loop without AmpCheck."""
    plain, checked = Job(convolutional()), Job(convolutional())

    with ampcheck.watch(checked.model, optimizer=checked.optimizer, report=False, emit=lambda text: None):
        checked.step()
        checked.step()
        return in_turn(lambda: [checked.step() for _ in range(20)], lambda: [plain.step() for _ in range(20)], rounds)


def calls_a_batch(batches: int = 50) -> float:
    """Python calls into AmpCheck in a batch, once the watched step is over."""
    job = Job(convolutional())
    ours = str(Path(ampcheck.__file__).parent)
    count = 0

    def profile(frame: object, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(ours)  # type: ignore[attr-defined]

    with ampcheck.watch(job.model, optimizer=job.optimizer, report=False, emit=lambda text: None):
        job.step()
        job.step()
        sys.setprofile(profile)
        for _ in range(batches):
            job.step()
        sys.setprofile(None)
    return count / batches


def growth(rounds: int) -> dict[int, float]:
    """What a watched step adds to a plain one, in ms, by the number of blocks of three modules."""
    added = {}
    for blocks in (10, 100, 1000):
        job = Job(many_small_modules(blocks))
        figures = in_turn(job.watched_step, job.step, max(3, rounds // 4))
        added[blocks] = figures["ampcheck_ms"] - figures["other_ms"]
    return added


def peak_memory() -> dict[str, float]:
    """Peak memory of a watched step over a plain one's: allocated on CUDA, resident in a fresh process on the CPU."""
    import subprocess

    peaks = {}
    for kind in ("step", "watched_step"):
        command = [sys.executable, __file__, "--peak", kind]
        peaks[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "watched_mib": peaks["watched_step"],
        "plain_mib": peaks["step"],
        "ratio": peaks["watched_step"] / peaks["step"],
    }


def print_peak(kind: str) -> None:
    model, x = convolutional()
    job = Job((model, x.repeat(16, 1, 1, 1)))
    getattr(Job(copy.deepcopy((model, x))), kind)()
    job.step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    getattr(job, kind)()
    peak = (
        torch.cuda.max_memory_allocated()
        if DEVICE == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(peak / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak", choices=("step", "watched_step"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak:
        print_peak(options.peak)
        return
    rounds = options.rounds
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    results: dict[str, object] = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}
    table = Table("what", "against", "ratio of medians", "quartiles", "bound", box=None, header_style="bold")

    def row(what: str, against: str, figures: dict[str, float], bound: str) -> None:
        results[what] = figures
        spread = f"{figures['q1']:.2f} to {figures['q3']:.2f}" if "q1" in figures else ""
        table.add_row(what, against, f"{figures['ratio']:.2f}", spread, bound)

    row("fit start, 10,000 modules", "Lightning's ModelSummary(max_depth=-1)", fit_start(rounds), "0.5")
    for name in MODELS:
        row(f"watched step, {name}", "set_detect_anomaly(True)", watched_step(name, rounds), "1.0")
    row("steady state, 20 steps", "the loop without AmpCheck", steady_state(rounds), "1.00")
    row("peak memory of a watched step", "a plain step", peak_memory(), "1.05")
    calls = results["calls_a_batch"] = calls_a_batch()
    added = results["growth_ms"] = growth(rounds)
    console = Console(width=120)
    console.print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {rounds} rounds")
    console.print(table)
    console.print(f"Python calls of AmpCheck in a batch of the steady state: {calls:g} (bound 1)")
    parts = ", ".join(f"{ms:.1f} ms for {blocks} blocks" for blocks, ms in added.items())
    console.print(f"added by a watched step: {parts}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
