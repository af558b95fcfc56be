"""How many in-place failures are named exactly (the line that wrote, the line that saved, the module and the code),
beside what `torch.autograd.set_detect_anomaly(True)` names on the same cases.

Run: python benchmarks/inplace_score.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from cases import Case
from inplace.conftest import Recorder
from torch import nn

FILES = ("inplace_saved", "inplace_silent", "inplace_kin", "inplace_timm")
ROLES = ("write", "save", "module", "code")


class Anomaly:
    """A guard that runs the region in anomaly mode and keeps all that PyTorch says."""

    def __init__(self) -> None:
        self.said = ""

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, **_: Any) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
            warnings.simplefilter("always")
            try:
                yield
            except RuntimeError as error:
                traceback, lines = error.__traceback__, [str(error)]
                while traceback is not None:
                    lines.append(f'File "{traceback.tb_frame.f_code.co_filename}", line {traceback.tb_lineno},')
                    traceback = traceback.tb_next
                self.said = "\n".join([*lines, *(str(warning.message) for warning in caught)])

    def names(self, case: Case, line: int) -> bool:
        return f'File "{case.file}", line {line},' in self.said


def named_by_ampcheck(case: Case) -> dict[str, bool]:
    recorder = Recorder()
    case.run(recorder)
    finding = next((finding for finding in recorder.findings if finding.code == case.code), None)
    named = {"code": finding is not None, "module": finding is not None and finding.module == case.module}
    for role, marker in case.marks.items():
        lines = {(site.file, site.line) for site in finding.sites if site.role == role} if finding else set()
        named[role] = lines == {(case.file, case.line(marker))}
    return named


def named_by_anomaly_mode(case: Case) -> dict[str, bool]:
    """Lines count wherever they are printed, alone or among others; modules and codes it does not know."""
    anomaly = Anomaly()
    case.run(anomaly)
    return {role: anomaly.names(case, case.line(marker)) for role, marker in case.marks.items()}


def main() -> None:
    cases = [case for name in FILES for case in import_module(f"cases.{name}").CASES]
    cases = [case for case in cases if all(importlib.util.find_spec(package) for package in case.needs)]
    torch.set_num_threads(1)
    rows = [(case, named_by_ampcheck(case), named_by_anomaly_mode(case)) for case in cases]

    print(f"torch {torch.__version__}, {len(rows)} cases\n")
    print(f"{'case':<44}{'code':<8}{'ampcheck':<28}anomaly mode")
    for case, ours, theirs in rows:
        print(f"{case.id:<44}{case.code or '':<8}{_words(ours):<28}{_words(theirs)}")
    print()
    for role in ROLES:
        of = [(ours[role], theirs.get(role, False)) for _, ours, theirs in rows if role in ours]
        print(f"{role:<8}{_share(mine for mine, _ in of):>20}{_share(other for _, other in of):>20}")
    exact = [(all(ours.values()), all(theirs.get(role, False) for role in ours)) for _, ours, theirs in rows]
    print(f"{'exactly':<8}{_share(mine for mine, _ in exact):>20}{_share(other for _, other in exact):>20}")


def _words(named: dict[str, bool]) -> str:
    return " ".join(role for role in ("write", "save", "raise", "call", "module", "code") if named.get(role)) or "–"


def _share(values: Any) -> str:
    values = list(values)
    return f"{sum(values)} of {len(values)} ({100 * sum(values) / max(1, len(values)):.0f} %)"


if __name__ == "__main__":
    main()
