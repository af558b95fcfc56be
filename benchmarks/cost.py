"""Measures what AmpCheck costs, beside the tools you might run instead: ``python benchmarks/cost.py``.

All sides of a comparison take turns in one process, in alternating order. The figures are ratios of medians, with the
quartiles of the per-round ratios. Runs on CUDA if available, else on the CPU. Install the peers with
``pip install '.[bench]'``; the output lists those that are missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import ampcheck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = (10, 100, 1000)

Clock = Callable[[], float]
Made = tuple[nn.Module, torch.Tensor]


def convolutional() -> Made:
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


def transformer() -> Made:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)), torch.randn(16, 32, 128)


def many_small_modules(blocks: int = 200) -> Made:
    layers = [nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()) for _ in range(blocks)]
    return nn.Sequential(*layers), torch.randn(8, 16)


MODELS: dict[str, Callable[[], Made]] = {
    "convolutional net": convolutional,
    "transformer": transformer,
    "600 small modules": many_small_modules,
}


class Job:
    """A model and its optimizer; ``step`` is one plain training step under bfloat16 autocast."""

    def __init__(self, made: Made) -> None:
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

    def debug_step(self) -> None:
        with debug_mode():
            self.step()

    def watched_step(self) -> None:
        self.seconds_watched()

    def seconds_watched(self) -> float:
        """The step and the rules that judge it. Fit start has a row of its own."""
        checker = self.attached()
        start = time.perf_counter()
        with checker.training_step():
            self.step()
        took = time.perf_counter() - start
        assert not checker.watching
        checker.detach()
        return took

    def attached(self) -> ampcheck.AmpChecker:
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(self.model, optimizers=[self.optimizer], emit=lambda text: None)
        return checker

    def broken_loss(self) -> torch.Tensor:
        """A loss whose backward fails: the result that ``exp`` saved is overwritten."""
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = self.model(self.x).float().exp()
            value += 1
        return value.mean()

    def seconds_to_note(self) -> float:
        """From the exception of an unwatched step to its note, including the replay of the batch."""
        checker = self.attached()
        with checker.training_step():
            self.step()
        try:
            self.broken_loss().backward()
        except RuntimeError as error:
            start = time.perf_counter()
            checker.diagnose(error, batch=self.broken_loss)
            took = time.perf_counter() - start
            notes = "\n".join(error.__notes__)
            assert "AMP401" in notes, notes
            checker.detach()
            return took
        raise AssertionError("the broken loss did not fail")


def debug_mode() -> AbstractContextManager[object]:
    from torch.utils._debug_mode import DebugMode

    mode: AbstractContextManager[object] = DebugMode()
    return mode


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def clock(function: Callable[[], object]) -> Clock:
    return lambda: seconds(function)


def in_turn(ours: Clock, others: dict[str, Clock], rounds: int) -> dict[str, dict[str, float]]:
    """For each other side, by name: both medians, their ratio ours/other, and the quartiles of the per-round ratios."""
    sides = [ours, *others.values()]
    for side in sides:
        side()
    times: list[list[float]] = []
    for number in range(rounds):
        gc.collect()
        order = range(len(sides)) if number % 2 else reversed(range(len(sides)))
        took = {index: sides[index]() for index in order}
        times.append([took[index] for index in range(len(sides))])
    medians = [statistics.median(side) for side in zip(*times, strict=True)]
    figures = {}
    for index, name in enumerate(others, 1):
        low, _, high = statistics.quantiles([row[0] / row[index] for row in times], n=4)
        ratio = medians[0] / medians[index]
        figures[name] = {
            "ampcheck_ms": medians[0] * 1e3, "other_ms": medians[index] * 1e3, "ratio": ratio, "q1": low, "q3": high
        }  # fmt: skip
    return figures


def fit_start(rounds: int) -> dict[str, dict[str, float]]:
    """The walk over 10,000 modules, against other tools that list a model's modules."""
    net, _ = many_small_modules(2500)

    def attach() -> None:
        checker = ampcheck.AmpChecker(report=False)
        checker.attach(net, emit=lambda text: None)
        checker.detach()

    others: dict[str, Clock] = {}
    if importlib.util.find_spec("lightning"):
        from lightning.pytorch import LightningModule
        from lightning.pytorch.utilities.model_summary import ModelSummary

        wrapped = LightningModule()
        wrapped.net = net
        others["Lightning's ModelSummary(max_depth=-1)"] = clock(lambda: ModelSummary(wrapped, max_depth=-1))
    if importlib.util.find_spec("torchinfo"):
        from torchinfo import summary

        others["torchinfo.summary(depth=10)"] = clock(lambda: summary(net, depth=10, verbose=0))
    return in_turn(clock(attach), others, rounds) if others else {}


def watched_step(name: str, rounds: int) -> dict[str, dict[str, float]]:
    job = Job(MODELS[name]())
    others = {"the plain step": clock(job.step), "the step under set_detect_anomaly(True)": clock(job.anomaly_step)}
    if importlib.util.find_spec("torch.utils._debug_mode"):
        others["the step under DebugMode()"] = clock(job.debug_step)
    return in_turn(job.seconds_watched, others, rounds)


def steady_state(rounds: int) -> dict[str, dict[str, float]]:
    """20 steps after the watched step, against the same loop without AmpCheck."""
    plain, checked = Job(convolutional()), Job(convolutional())

    def loop(job: Job) -> Clock:
        return clock(lambda: [job.step() for _ in range(20)])

    with ampcheck.watch(checked.model, optimizer=checked.optimizer, report=False, emit=lambda text: None):
        checked.step()
        checked.step()
        return in_turn(loop(checked), {"the loop without AmpCheck": loop(plain)}, rounds)


def guarded(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Steps under ``numerics="guard"``, which looks at the loss and a few gradients of each, against plain ones."""
    job = Job(MODELS[name]())

    def loop() -> None:
        for _ in range(5):
            job.step()

    def seconds_guarded() -> float:
        checker = ampcheck.AmpChecker(report=False, numerics="guard")
        checker.attach(job.model, optimizers=[job.optimizer], emit=lambda text: None)
        job.step()
        took = seconds(loop)
        checker.detach()
        return took

    return in_turn(seconds_guarded, {"the loop without it": clock(loop)}, rounds)


def calls_a_batch(batches: int = 50) -> float:
    """Python calls into AmpCheck per batch, after the watched step."""
    job = Job(convolutional())
    ours = str(Path(ampcheck.__file__).parent)
    count = 0

    def profile(frame: Any, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(ours)

    with ampcheck.watch(job.model, optimizer=job.optimizer, report=False, emit=lambda text: None):
        job.step()
        job.step()
        sys.setprofile(profile)
        for _ in range(batches):
            job.step()
        sys.setprofile(None)
    return count / batches


def failure_to_note(name: str, rounds: int) -> dict[str, float]:
    """``bound_ms`` is five plain steps plus 100 ms."""
    job = Job(MODELS[name]())
    first = job.seconds_to_note()
    (figures,) = in_turn(job.seconds_to_note, {"": clock(job.step)}, rounds).values()
    return {**figures, "first_ms": first * 1e3, "bound_ms": 5 * figures["other_ms"] + 100}


def growth(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a watched and a plain step, by the number of blocks of three modules."""
    found = {}
    for blocks in BLOCKS:
        job = Job(many_small_modules(blocks))
        (figures,) = in_turn(job.seconds_watched, {"": clock(job.step)}, max(5, rounds // 2)).values()
        watched, plain = figures["ampcheck_ms"], figures["other_ms"]
        found[str(blocks)] = {"watched_ms": watched, "plain_ms": plain, "added_ms": watched - plain}
    return found


def peak_memory(rounds: int) -> dict[str, float]:
    """Peak memory of a watched step over that of a plain one: allocated on CUDA; on the CPU, resident in fresh
    processes."""
    peaks: dict[str, list[float]] = {"step": [], "watched_step": []}
    for _ in range(max(3, rounds // 4)):
        for kind, found in peaks.items():
            command = [sys.executable, __file__, "--peak", kind]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    watched, plain = peaks["watched_step"], peaks["step"]
    low, _, high = statistics.quantiles([w / p for w, p in zip(watched, plain, strict=True)], n=4)
    ratio = statistics.median(watched) / statistics.median(plain)
    return {
        "watched_mib": statistics.median(watched), "plain_mib": statistics.median(plain), "ratio": ratio,
        "q1": low, "q3": high,
    }  # fmt: skip


def print_peak(kind: str) -> None:
    model, x = convolutional()
    job = Job((model, x.repeat(16, 1, 1, 1)))
    getattr(Job(convolutional()), kind)()
    job.step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    getattr(job, kind)()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print((torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident) / 2**20)


def machine() -> dict[str, object]:
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    packages = {name: version(name) for name in ("lightning", "torchinfo") if importlib.util.find_spec(name)}
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{name}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
    }


def picture(results: dict[str, Any], path: Path) -> None:
    """Left: ratios with quartiles and bounds. Right: growth with the number of blocks."""
    from matplotlib.figure import Figure

    rows = results["ratios"][::-1]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        beyond = row["bound"] is not None and row["ratio"] > row["bound"]
        left.plot((row["q1"], row["q3"]), (y, y), color="0.6", linewidth=5, solid_capstyle="butt", zorder=1)
        left.plot(row["ratio"], y, "o", color="tab:red" if beyond else "tab:blue", zorder=3)
        if row["bound"] is not None:
            left.plot((row["bound"],) * 2, (y - 0.35, y + 0.35), color="black", linewidth=1.5, zorder=2)
    left.set_yticks(range(len(rows)), [f"{row['what']}\nagainst {row['against']}" for row in rows], fontsize=8)
    left.set_xlabel("AmpCheck / other: medians, quartiles (grey), bound (black line)")
    left.set_xscale("log")
    left.grid(axis="x", which="both", alpha=0.2)
    blocks = [int(name) for name in results["growth"]]
    for kind, label in (("watched_ms", "watched step"), ("plain_ms", "plain step")):
        right.loglog(blocks, [each[kind] for each in results["growth"].values()], "o-", label=label)
    start = next(iter(results["growth"].values()))["watched_ms"]
    right.loglog(blocks, [start * n / blocks[0] for n in blocks], ":", color="0.5", label="linear")
    right.set_xlabel("blocks of three modules")
    right.set_ylabel("ms")
    right.legend()
    figure.suptitle(", ".join(f"{key} {value}" for key, value in results["machine"].items()), fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them to FILE (PNG or SVG)")
    parser.add_argument("--peak", choices=("step", "watched_step"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak:
        print_peak(options.peak)
        return
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    if options.picture and not importlib.util.find_spec("matplotlib"):
        parser.error("--picture needs matplotlib: pip install '.[bench]'")
    rounds = options.rounds
    ratios: list[dict[str, Any]] = []

    def rows(what: str, figures: dict[str, dict[str, float]], bounds: dict[str, float]) -> None:
        for against, row in figures.items():
            bound = next((bound for part, bound in bounds.items() if part in against), None)
            ratios.append({"what": what, "against": against, "bound": bound, **row})

    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "ratios": ratios}
    rows("fit start, 10,000 modules", fit_start(rounds), {"ModelSummary": 0.5})
    for name in MODELS:
        anomaly = 1.0 if name == "convolutional net" else 0.5
        rows(f"watched step, {name}", watched_step(name, rounds), {"plain": 1.5, "anomaly": anomaly})
    rows("20 later steps", steady_state(rounds), {"loop": 1.0})
    for name in ("convolutional net", "transformer"):
        rows(f"numerics='guard', {name}", guarded(name, 2 * rounds), {"loop": 1.01})
    rows("peak memory of a watched step", {"a plain step": peak_memory(rounds)}, {"plain": 1.05})
    results["failure"] = {name: failure_to_note(name, rounds) for name in MODELS}
    results["calls_a_batch"] = calls_a_batch()
    results["growth"] = growth(rounds)

    console = Console(width=120)
    console.print(", ".join(f"{key} {value}" for key, value in results["machine"].items()) + f", {rounds} rounds")
    table = Table("what", "against", "ratio", "quartiles", "bound", box=None, header_style="bold")
    for row in ratios:
        spread, bound = f"{row['q1']:.2f} to {row['q3']:.2f}", "" if row["bound"] is None else f"{row['bound']:g}"
        table.add_row(row["what"], row["against"], f"{row['ratio']:.2f}", spread, bound)
    console.print(table)
    for package in ("lightning", "torchinfo", "torch.utils._debug_mode"):
        if not importlib.util.find_spec(package):
            console.print(f"left out: {package} is not installed")
    for name, failed in results["failure"].items():
        console.print(
            f"failure to note, {name}: {failed['ampcheck_ms']:.0f} ms, {failed['first_ms']:.0f} ms the first time "
            f"(a plain step: {failed['other_ms']:.0f} ms; bound {failed['bound_ms']:.0f} ms)"
        )
    console.print(f"Python calls into AmpCheck per later batch: {results['calls_a_batch']:g} (bound 1)")
    for blocks, grown in results["growth"].items():
        console.print(f"watched step, {blocks} blocks: {grown['watched_ms']:.1f} ms; plain: {grown['plain_ms']:.1f} ms")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.picture:
        picture(results, options.picture)


if __name__ == "__main__":
    main()
