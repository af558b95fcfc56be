"""Trains the zoo: ``python -m benchmarks.zoo [--only PATTERN] [--sample N] [--json FILE]``.

Each model trains for two steps and evaluates once, on the CPU, from random weights, in float32 and under bfloat16 and
float16 autocast: first alone, then from the same seed inside ``ampcheck.watch``. The exit status is 1 if a healthy
model gets an error, if AmpCheck fails (AMP900), or if watched and plain training differ. Warnings and infos are listed
for you to read.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

Runs = dict[str, list[dict[str, Any]]]

PROCESSES = 2
MODELS_A_PROCESS = 12
MEMORY = 10 * 2**30
ROOT = Path(__file__).resolve().parent.parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "1", "YOLO_VERBOSE": "false", "OMP_NUM_THREADS": "1"}


def recipes() -> dict[str, Any]:
    from .detection import DETECTION
    from .images import TIMM, TORCHVISION
    from .loops import LOOPS
    from .sequences import SEQUENCES

    found = {recipe.name: recipe for recipe in (*LOOPS, *SEQUENCES, *TIMM, *DETECTION, *TORCHVISION)}
    return {name: r for name, r in found.items() if all(importlib.util.find_spec(need) for need in r.needs)}


def work() -> None:
    """A worker process: reads names of models from standard input and writes their runs as JSON lines."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what models print goes to standard error
    import torch

    from .trial import tried

    torch.set_num_threads(1)
    known = recipes()
    for line in sys.stdin:
        recipe = known[line.strip()]
        print(json.dumps([tried(recipe, dtype) for dtype in recipe.dtypes]), file=answers, flush=True)


class Worker:
    """Trains the models of a queue in a process, and starts a new one when it crashes, hangs or is full."""

    def __init__(self, todo: SimpleQueue[Any], done: Runs, timeout: float, keep: Callable[[], None]) -> None:
        self.todo, self.done, self.timeout, self.keep = todo, done, timeout, keep
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        trained = 0
        while True:
            try:
                recipe = self.todo.get_nowait()
            except Empty:
                break
            if trained >= MODELS_A_PROCESS or recipe.alone:
                self.stop()
            if self.process is None:
                self.process, trained = self.start(), 0
            start = time.perf_counter()
            self.done[recipe.name] = runs = self.train(self.process, recipe)
            took, outcomes = time.perf_counter() - start, "/".join(run["outcome"] for run in runs)
            self.keep()
            print(f"{len(self.done)} {recipe.name}: {outcomes}, {took:.1f} s", file=sys.stderr, flush=True)
            trained = MODELS_A_PROCESS if recipe.alone or self.process.poll() is not None else trained + 1
        self.stop()

    @staticmethod
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.zoo", "--work"],
            cwd=ROOT,
            env=os.environ | OFFLINE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def train(self, process: subprocess.Popen[str], recipe: Any) -> list[dict[str, Any]]:
        assert process.stdin is not None
        assert process.stdout is not None
        hung = threading.Timer(self.timeout, process.kill)
        hung.start()
        try:
            process.stdin.write(f"{recipe.name}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        expired = not hung.is_alive()
        hung.cancel()
        if answer:
            runs: list[dict[str, Any]] = json.loads(answer)
            return runs
        process.wait()
        error = f"timed out after {self.timeout:g} s" if expired else f"the process ended with {process.returncode}"
        return [{"dtype": dtype, "outcome": "lost", "error": error, "findings": []} for dtype in recipe.dtypes]

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
        self.process = None


def sampled(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, spread evenly."""
    return [names[i * len(names) // count] for i in range(count)] if 0 < count < len(names) else list(names)


def is_bad(run: dict[str, Any]) -> bool:
    """Whether AmpCheck raised an alarm on a healthy model, or changed its training."""
    if run["outcome"] == "fails alone":
        return False
    alarms = any(finding["severity"] == "error" or finding["code"] == "AMP900" for finding in run["findings"])
    return alarms or run["outcome"] != "healthy"


def print_table(runs: Runs, families: dict[str, str]) -> None:
    print(f"{'family':<34}{'models':>8}{'healthy':>9}{'error':>8}{'warning':>9}{'info':>6}{'differ':>8}{'lost':>6}")
    rows: dict[str, Counter[str]] = {}
    for name, of_model in runs.items():
        row = rows.setdefault(families[name], Counter())
        row["models"] += 1
        row["healthy"] += all(run["outcome"] == "healthy" for run in of_model)
        for run in of_model:
            row["differ"] += run["outcome"] in ("differs", "raises")
            row["lost"] += run["outcome"] in ("lost", "not watched")
            row.update(finding["severity"] for finding in run["findings"])
    total = sum(rows.values(), Counter())
    for family, row in [*rows.items(), ("all", total)]:
        cells = (("models", 8), ("healthy", 9), ("error", 8), ("warning", 9), ("info", 6), ("differ", 8), ("lost", 6))
        print(f"{family:<34}" + "".join(f"{row[column]:>{width}}" for column, width in cells))
    print("healthy: in every precision. error, warning, info: findings. differ: training is not bit-identical.")


def print_findings(runs: Runs) -> None:
    """Each message once, with the models that got it."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for name, of_model in runs.items():
        for run in of_model:
            for finding in run["findings"]:
                key = finding["code"], finding["severity"], finding["message"]
                grouped.setdefault(key, []).append(f"{name}/{run['dtype']}")
    for (code, severity, message), where in sorted(grouped.items()):
        print(f"{severity}[{code}] {message}\n    {len(where)} ×: {', '.join(where[:8])}{' …' * (len(where) > 8)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--only", metavar="PATTERN", default="*", help="models or families by name, such as 'timm/*'")
    parser.add_argument("--sample", metavar="N", type=int, default=0, help="only N of them, spread evenly")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all runs to FILE")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=180, help="for one model (180)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0

    import torch

    known = recipes()
    families = {name: recipe.family for name, recipe in known.items()}
    chosen = [n for n in known if any(fnmatch.fnmatch(word, options.only) for word in (n, families[n]))]
    if not chosen:
        parser.error(f"no model matches {options.only!r}")
    todo: SimpleQueue[Any] = SimpleQueue()
    names = sampled(chosen, options.sample)
    for name in names:
        todo.put(known[name])
    versions = {need: version(need) for name in names for need in known[name].needs}
    about = {"torch": torch.__version__, **versions, "python": platform.python_version(), "machine": platform.machine()}
    start, done = time.perf_counter(), dict[str, Any]()
    writing = threading.Lock()

    def keep() -> None:
        with writing:
            about["minutes"] = str(round((time.perf_counter() - start) / 60, 1))
            if options.json:
                content = {**about, "families": families, "runs": {name: done[name] for name in names if name in done}}
                options.json.write_text(json.dumps(content, indent=1) + "\n")

    for worker in [Worker(todo, done, options.timeout, keep) for _ in range(PROCESSES)]:
        worker.thread.join()
    runs: Runs = {name: done[name] for name in names}

    print(", ".join(f"{what} {value}" for what, value in about.items()), end="\n\n")
    print_table(runs, families)
    each = [(name, run) for name, of_model in runs.items() for run in of_model]
    for title, wanted in (
        ("fails without AmpCheck", lambda run: run["outcome"] == "fails alone"),
        ("two plain runs differ", lambda run: run.get("repeatable") is False),
        ("wrong", is_bad),
    ):
        listed = [(name, run) for name, run in each if wanted(run)]
        print(f"\n{title}: {len(listed)} of {len(each)} runs")
        for name, run in listed:
            print(f"    {name}/{run['dtype']}: {run['outcome']} {run.get('error', '')}".rstrip())
    print("\nfindings:")
    print_findings(runs)
    return int(any(is_bad(run) for _, run in each))


if __name__ == "__main__":
    sys.exit(main())
