"""Scores AmpCheck on real failures: are the code, the module, the lines and the reason right, and does the fix work?
PyTorch's own message and `torch.autograd.set_detect_anomaly(True)` are scored beside it on the same cases.

Run: python benchmarks/score.py [--json FILE] [--file NAME] [CASE ...]

The cases are programs in tests/cases, most of them from public reports. Each states what must be named, and has a
twin with the fix of the finding applied. Cases of a host run in its own trainer. The exit status is 1 if anything is
not right.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import Case
from torch import nn

import ampcheck
from ampcheck import AmpChecker, Finding, Severity

PLAIN = (
    "inplace_saved",
    "inplace_silent",
    "inplace_timm",
    "inplace_kin",
    "dtype_crashes",
    "autocast_argument",
    "scaler_crashes",
    "misconfigured",
    "exports",
    "reported",
    "later",
)
IN_HOSTS = tuple(sorted(path.stem for path in Path(__file__).parents[1].glob("tests/cases/hosts_*.py")))
"""Files of cases. Those of a host run in a process of their own."""

COLUMNS = {"code": "code", "module": "module", "line": "lines", "reason": "reason", "fix": "fix works"}
OTHERS = {"pytorch": "PyTorch's message", "anomaly": "anomaly mode"}

Named = dict[str, bool]
Entry = dict[str, Any]


class Watched:
    """A guard that checks a region as an adapter does: it watches the step and diagnoses what the step raises."""

    anomaly = False

    def __init__(self, *, watched: bool = True) -> None:
        # The cases are not about which dtypes this machine computes natively.
        self.checker = AmpChecker(ignore="AMP107", watch_steps=int(watched), report=False, numerics="off")
        self.error: Exception | None = None
        self.trained = False
        self.findings: tuple[Finding, ...] = ()

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, *, phase: str = "training_step", **context: Any) -> Iterator[None]:
        checker = self.checker
        checker.attach(model, emit=lambda text: None, **context)
        step = checker.evaluation_step() if phase == "validation_step" else checker.training_step()
        with self._trains(model):
            try:
                with step:
                    yield
            except Exception as error:  # noqa: BLE001 - that is what the case is about
                self.error = error
                checker.diagnose(error, phase=phase)
        self._take()
        checker.detach()

    @contextlib.contextmanager
    def host(self, model: nn.Module) -> Iterator[None]:
        with self._trains(model):
            try:
                yield
            except Exception as error:  # noqa: BLE001
                self.error = error
        self._take()

    @contextlib.contextmanager
    def script(self) -> Iterator[None]:
        watch = ampcheck.watch(None, checker=self.checker, emit=lambda text: None)
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                with watch:
                    yield
            except Exception as error:  # noqa: BLE001
                self.error = error
        self._take()

    @contextlib.contextmanager
    def export(self) -> Iterator[Callable[..., None]]:
        def compare(*compared: Any) -> None:
            self.findings = ampcheck.compare(*compared).findings

        yield compare

    def _take(self) -> None:
        report = self.checker.report
        assert report is not None, "nothing was attached"
        assert report.trace.internal_error is None, report.trace.internal_error
        self.findings = report.findings

    @contextlib.contextmanager
    def _trains(self, model: nn.Module) -> Iterator[None]:
        before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        yield
        self.trained = any(
            not torch.equal(parameter.detach(), was)
            or (parameter.grad is not None and bool(parameter.grad.any()) and bool(parameter.grad.isfinite().all()))
            for parameter, was in before
        )


class Unwatched:
    """A guard that records what a user sees without AmpCheck: the exception, the traceback and the warnings."""

    checker = None

    def __init__(self, *, anomaly: bool = False) -> None:
        self.anomaly = anomaly
        self.message = ""
        self.said = ""

    @contextlib.contextmanager
    def __call__(self, model: nn.Module | None = None, **_: Any) -> Iterator[None]:
        mode = torch.autograd.set_detect_anomaly(True) if self.anomaly else contextlib.nullcontext()
        with warnings.catch_warnings(record=True) as caught, mode:
            warnings.simplefilter("always")
            try:
                yield
            except Exception as error:  # noqa: BLE001
                self.message = str(error)
                self.said = "".join(traceback.format_exception(error))
        for warning in caught:
            self.said += f'\n{warning.message}\n  File "{warning.filename}", line {warning.lineno}, '

    def host(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self(model)

    def script(self) -> contextlib.AbstractContextManager[None]:
        return self()

    @contextlib.contextmanager
    def export(self) -> Iterator[Callable[..., None]]:
        with self():
            yield lambda *compared: None

    def named(self, case: Case) -> Named:
        """A line counts wherever it is printed, even among others; a module counts if the message has its name. Codes,
        reasons and fixes are not scored."""
        named = {"module": f"'{case.module}'" in self.message}
        for role, mark in case.marks.items():
            named[f"{role} line"] = f'File "{case.file}", line {case.line(mark)}, ' in self.said
        return {role: named[role] for role in to_name(case) if role in named}


def to_name(case: Case) -> list[str]:
    """What there is to name. A failure outside any module has no module, for example."""
    roles = {"code": True, "module": case.module is not None, **{f"{role} line": True for role in case.marks}}
    roles |= {"reason": bool(case.reason or case.evidence or case.operands), "fix": case.remedies > 0}
    return [role for role, there in roles.items() if there]


def wrong(case: Case, *, watched: bool = True) -> dict[str, str]:
    """What AmpCheck gets wrong in a case, in words, by role."""
    guard = Watched(watched=watched)
    case.run(guard)
    found = [finding for finding in guard.findings if finding.code == case.code]
    if (guard.error is not None) is not case.crashes:
        raise AssertionError(f"{case.id} {'does not crash' if case.crashes else 'crashes'}") from guard.error
    if not found:
        codes = ", ".join(finding.code for finding in guard.findings) or "nothing"
        return {role: f"found {codes}" for role in to_name(case) if role != "fix"}
    finding, faults = found[0], {}
    expected = (case.code, *case.also)
    more = [one for one in guard.findings if one.severity is Severity.ERROR and one.code not in expected]
    if more or len(found) > 1:
        faults["code"] = f"also found {', '.join(one.code for one in [*more, *found[1:]])}"
    if finding.module != case.module:
        faults["module"] = f"{finding.module!r}"
    for role, mark in case.marks.items():
        lines = _wrong_lines(case, finding, role, mark)
        if lines:
            faults[f"{role} line"] = lines
    reasons = [*_wrong_evidence(case, finding)]
    if reasons:
        faults["reason"] = "; ".join(reasons)
    return faults


def _wrong_lines(case: Case, finding: Finding, role: str, mark: str) -> str:
    lines = {site.line for site in finding.sites if site.role == role and site.file == case.file}
    expected = case.line(mark)
    # Several lines may have made the operands.
    right = expected in lines if role in ("call", "cast") else lines == {expected}
    return "" if right else f"{sorted(lines)}, not {expected}"


def _wrong_evidence(case: Case, finding: Finding) -> Iterator[str]:
    expected = dict(case.evidence) | ({"reason": case.reason} if case.reason else {})
    for key, value in expected.items():
        if finding.evidence.get(key) != value:
            yield f"{key} {finding.evidence.get(key)!r}"
    if case.operands is not None:
        operands = {operand["name"]: operand["dtype"] for operand in finding.evidence["operands"]}
        if operands != dict(case.operands):
            yield f"operands {operands}"


def fails_again(case: Case) -> str:
    """What goes wrong when each fix is applied: the case must then train, without a finding."""
    for remedy in range(1, case.remedies + 1):
        guard = Watched()
        case.run(guard, repaired=remedy)
        found = {one.code for one in guard.findings if one.code == case.code or one.severity is Severity.ERROR}
        found -= set(case.also)
        if guard.error is not None:
            return f"remedy {remedy} raises {guard.error!r}"
        if found:
            return f"remedy {remedy} leaves {', '.join(found)}"
        if case.trains and not guard.trained:
            return f"remedy {remedy} trains nothing"
    return ""


def score(case: Case) -> Entry:
    """What AmpCheck, PyTorch and anomaly mode name in a case."""
    roles = to_name(case)
    with warnings.catch_warnings(), _seeded():
        warnings.simplefilter("ignore")
        faults = wrong(case)
        again = fails_again(case)
        if again:
            faults["fix"] = again
        entry: Entry = {
            "family": case.family,
            "host": case.host,
            "code": case.code,
            "source": list(case.source),
            "wrong": faults,
            "ampcheck": {role: role not in faults for role in roles},
        }
        for name in OTHERS:
            guard = Unwatched(anomaly=name == "anomaly")
            case.run(guard)
            entry[name] = guard.named(case)
        in_host = Path(case.file).stem in IN_HOSTS
        if case.crashes and case.family in ("dtype", "autocast", "scaler") and not in_host:
            unseen = wrong(case, watched=False)
            entry["unwatched"] = {role: role not in unseen for role in roles if role != "fix"}
    return entry


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def left_out(case: Case) -> str:
    """Why a case cannot run here; empty if it can."""
    missing = [package for package in case.needs if importlib.util.find_spec(package) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    return "" if case.fails() else f"it does not fail on torch {torch.__version__}"


def run_file(name: str, chosen: Sequence[str]) -> dict[str, Entry]:
    """The entries of the cases in one file; ``{"left_out": why}`` for those that cannot run."""
    # A missing import at the top of a host's file is the host itself.
    try:
        cases: Iterable[Case] = import_module(f"cases.{name}").CASES
    except ModuleNotFoundError as error:
        return {name: {"left_out": f"{error.name} is not installed"}}
    entries: dict[str, Entry] = {}
    for case in cases:
        if chosen and case.id not in chosen:
            continue
        why = left_out(case)
        entries[case.id] = {"left_out": why} if why else score(case)
    return entries


def run_apart(name: str, chosen: Sequence[str]) -> dict[str, Entry]:
    """``run_file`` in a process of its own, in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory, "table.json")
        command = [sys.executable, __file__, "--file", name, "--json", str(table), *chosen]
        environment = {**os.environ, "YOLO_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        ran = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
        if not table.is_file():
            raise RuntimeError(f"{name} ended with status {ran.returncode}:\n{ran.stderr[-4000:]}")
        entries: dict[str, Entry] = json.loads(table.read_text(encoding="utf-8"))["cases"]
        return entries


def share(entries: Iterable[Entry], column: str, role: str) -> tuple[int, int]:
    """How often ``role`` was named, and in how many cases there was one to name."""
    named = [entry[column] for entry in entries if column in entry]
    asked = [right for one in named for name, right in one.items() if name.rpartition(" ")[2] == role]
    return sum(asked), len(asked)


def exactly(entries: Iterable[Entry], column: str) -> tuple[int, int]:
    """In how many cases everything was named, and how many cases there are."""
    named = [entry[column] for entry in entries if column in entry]
    return sum(all(one.values()) for one in named), len(named)


def show(entries: dict[str, Entry]) -> None:
    ran = {id: entry for id, entry in entries.items() if "left_out" not in entry}
    print(f"torch {torch.__version__}, {len(ran)} cases")
    for id, entry in entries.items():
        if "left_out" in entry:
            print(f"left out: {id}: {entry['left_out']}")
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in ran.values():
        groups.setdefault((entry["family"], entry["host"]), []).append(entry)
    groups["all", ""] = list(ran.values())
    wide = 22
    print(f"\n{'':<{wide}}{'AmpCheck':<62}" + "".join(f"{words:<20}" for words in OTHERS.values()))
    heads = [*COLUMNS.values(), "all of it"]
    print(
        f"{'family, host':<{wide}}"
        + "".join(f"{head:<10}" for head in heads)
        + "  "
        + f"{'module':<9}{'lines':<11}" * 2
    )
    for (family, host), group in groups.items():
        cells = [_of(share(group, "ampcheck", role)) for role in COLUMNS] + [_of(exactly(group, "ampcheck"))]
        others = [f"{_of(share(group, name, 'module')):<9}{_of(share(group, name, 'line')):<11}" for name in OTHERS]
        print(f"{f'{family} {host}':<{wide}}" + "".join(f"{cell:<10}" for cell in cells) + "  " + "".join(others))
    unseen = [entry for entry in ran.values() if "unwatched" in entry]
    if unseen:
        cells = [
            f"{COLUMNS[role]} {_of(share(unseen, 'unwatched', role))}" for role in ("code", "module", "line", "reason")
        ]
        print(f"\nCrashes over dtypes, autocast and scalers in unwatched steps: {', '.join(cells)}.")
    faults = {id: entry["wrong"] for id, entry in ran.items() if entry["wrong"]}
    for id, fault in faults.items():
        for role, what in fault.items():
            print(f"not right: {id}: {role}: {what}")


def _of(counts: tuple[int, int]) -> str:
    right, whole = counts
    return f"{right}/{whole}" if whole else "–"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="run only these cases")
    parser.add_argument("--file", action="append", choices=PLAIN + IN_HOSTS, help="run only the cases in this file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(arguments)

    logging.disable(logging.CRITICAL)
    entries: dict[str, Entry] = {}
    files = options.file or PLAIN + IN_HOSTS
    for name in files:
        apart = name in IN_HOSTS and len(files) > 1
        entries |= run_apart(name, options.cases) if apart else run_file(name, options.cases)
    show(entries)
    if options.json is not None:
        table = {"torch": torch.__version__, "cases": entries}
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return int(any(entry.get("wrong") for entry in entries.values()))


if __name__ == "__main__":
    sys.exit(main())
