"""How many dtype, autocast-argument and gradient-scaler crashes are named exactly (the code, the module, the lines and
the reason), when the failing step was watched and when it was not, beside what PyTorch's own message names.

Run: python benchmarks/crash_score.py [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import Case
from failure.conftest import Recorder
from torch import nn

FILES = ("dtype_crashes", "scaler_crashes", "autocast_argument")
ROLES = ("code", "module", "lines", "reason")
ROUTES = ("watched", "unwatched", "plain")

Named = dict[str, bool]


class Plain:
    """A guard that keeps PyTorch's exception as a user without AmpCheck sees it."""

    def __init__(self) -> None:
        self.message = ""
        self.lines: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, **_: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (that is what the case is about)
            self.message = str(error)
            self.lines = {(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)}


def expected(case: Case) -> Named:
    """What there is to name; all of it yet unnamed. A failure outside of any module has none."""
    roles = {"code": case.code is not None, "module": case.module is not None, "lines": bool(case.marks)}
    roles["reason"] = case.reason is not None or "reason" in case.evidence
    return {role: False for role in ROLES if roles[role]}


def named_by_ampcheck(case: Case, *, watched: bool) -> Named:
    recorder = Recorder(watched=watched)
    case.run(recorder)
    finding = next(iter(recorder.found(case.code)), None)
    if finding is None:
        return expected(case)
    sites = {(site.role, site.file, site.line) for site in finding.sites}
    named = {
        "code": True,
        "module": finding.module == case.module,
        "lines": {(role, case.file, case.line(mark)) for role, mark in case.marks.items()} <= sites,
        "reason": finding.evidence.get("reason") == (case.reason or case.evidence.get("reason")),
    }
    return {role: named[role] for role in expected(case)}


def named_by_pytorch(case: Case) -> Named:
    """The message and the traceback: the line that raised counts for a case that asks for no other, and a module
    counts where the message has its name. Codes and reasons it does not know."""
    plain = Plain()
    case.run(plain)
    named = expected(case)
    if "lines" in named:
        named["lines"] = all((case.file, case.line(mark)) in plain.lines for mark in case.marks.values())
    if "module" in named:
        named["module"] = f"'{case.module}'" in plain.message
    return named


def score(case: Case) -> dict[str, Named]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "watched": named_by_ampcheck(case, watched=True),
            # What only a watched step shows raises nothing that could be explained without one.
            "unwatched": named_by_ampcheck(case, watched=False) if case.crashes else {},
            "plain": named_by_pytorch(case),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    cases = [case for name in FILES for case in import_module(f"cases.{name}").CASES]
    present = [case for case in cases if all(importlib.util.find_spec(package) for package in case.needs)]
    rows = {case.id: (case, score(case)) for case in present}

    print(f"torch {torch.__version__}, {len(rows)} cases")
    for case in cases:
        if case not in present:
            print(f"left out: {case.id}, which needs {', '.join(case.needs)}")
    print(f"\n{'case':<38}{'code':<8}{'watched: not named':<22}{'unwatched: not named':<24}plain PyTorch: named")
    for id, (case, named) in rows.items():
        missed = [_words(role for role, right in named[route].items() if not right) for route in ROUTES[:2]]
        plain = _words(role for role, right in named["plain"].items() if right)
        unwatched = missed[1] if case.crashes else "does not crash"
        print(f"{id:<38}{case.code or '':<8}{missed[0]:<22}{unwatched:<24}{plain}")

    shares = {role: {route: _share(rows, role, route) for route in ROUTES} for role in (*ROLES, "exactly")}
    print(f"\n{'named':<10}" + "".join(f"{route:>20}" for route in ROUTES))
    for role, share in shares.items():
        print(f"{role:<10}" + "".join(f"{_percent(*share[route]):>20}" for route in ROUTES))

    if options.json is not None:
        table = {
            "torch": torch.__version__,
            "cases": {id: {"code": case.code, **named} for id, (case, named) in rows.items()},
            "shares": shares,
        }
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _share(rows: dict[str, tuple[Case, dict[str, Named]]], role: str, route: str) -> tuple[int, int]:
    """How often ``role`` was named, of how many times there was one to name."""
    named = [result[route] for _, result in rows.values() if result[route]]
    if role == "exactly":
        return sum(all(one.values()) for one in named), len(named)
    asked = [one[role] for one in named if role in one]
    return sum(asked), len(asked)


def _percent(right: int, whole: int) -> str:
    return f"{right} of {whole} ({100 * right / max(1, whole):.0f} %)"


def _words(roles: Iterator[str]) -> str:
    return " ".join(roles) or "–"


if __name__ == "__main__":
    main()
