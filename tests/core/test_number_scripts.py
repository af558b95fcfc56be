"""Whole scripts whose numbers fail at a later step, as people write them.

What is said of each is held against ``tests/numbers/truth.json``, which was written with the scripts, before any of
them was run under AmpCheck. Their twins, which are in the scripts too, give no error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Script

import ampcheck
from ampcheck import Severity

FOLDER = Path(__file__).parents[1] / "numbers"
TRUTH: dict[str, dict[str, Any]] = json.loads((FOLDER / "truth.json").read_text(encoding="utf-8"))
# What is not told, and why.
MISSED = {
    "audio_tagging_skip": "the script skips the batch before backward, so nothing of AmpCheck's sees its loss",
}


@dataclass
class Guarded:
    """Watches a script as ``ampcheck run`` does."""

    report: Any = None
    checker: Any = None
    anomaly: bool = False

    @contextlib.contextmanager
    def script(self) -> Iterator[None]:
        self.checker = ampcheck.AmpChecker(numerics="guard", ignore="AMP107", report=False)
        watch = ampcheck.watch(None, checker=self.checker, emit=lambda text: None)
        with contextlib.suppress(Exception, SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with watch:
                yield
        self.report = self.checker.report


def run(name: str, *, repaired: int = 0) -> Any:
    for package in needed(name):
        if package in MISSING:
            pytest.skip(MISSING[package])
    script = Script(name, lambda *_: None, None, "numbers", path=FOLDER / f"{name}.py")
    guarded: Any = Guarded()
    # What earlier scripts left behind is none of this one's optimizers.
    gc.collect()
    gc.freeze()
    try:
        script.run(guarded, repaired=repaired)
    finally:
        gc.unfreeze()
        torch.set_default_dtype(torch.float32)
    assert guarded.report.trace.internal_error is None, guarded.report.trace.internal_error
    return guarded.report


def needed(name: str) -> list[str]:
    """The packages beside torch that a script imports."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return sorted(
        set(re.findall(r"^(?:import|from) (timm|transformers|torchvision|scipy|numpy|sklearn)\b", text, re.M))
    )


# Importing some of them patches PyTorch, which is none of AmpCheck's doing.
MISSING: dict[str, str] = {}
for package in sorted({package for name in TRUTH for package in needed(name)}):
    try:
        importlib.import_module(package)
    except ImportError:
        MISSING[package] = f"{package} is not installed"


def among(said: Any, true: Any) -> bool:
    return said in true if isinstance(true, list) else said == true


@pytest.mark.parametrize("name", TRUTH)
def test_what_failed_is_named(name: str, request: pytest.FixtureRequest) -> None:
    if name in MISSED:
        request.applymarker(pytest.mark.xfail(reason=MISSED[name], strict=True))
    true = TRUTH[name]
    found = run(name).findings
    codes = {finding.code for finding in found}
    assert all(codes.intersection(either) for either in true["codes"]), codes
    allowed = {code for either in true["codes"] for code in either}.union(true["also"])
    assert {finding.code for finding in found if finding.severity is Severity.ERROR} <= allowed
    if not true["codes"] or "kind" not in true:
        return
    finding = next(one for one in found if one.code in true["codes"][0])
    evidence = finding.evidence
    for fact in ("op", "kind", "phase", "dtype", "step"):
        assert fact not in true or among(evidence[fact], true[fact]), (fact, evidence[fact], true[fact])
    tried = {name: finite for name, finite in evidence["finite_in"].items() if name in true["finite_in"]}
    assert all(among(finite, true["finite_in"][name]) for name, finite in tried.items()), tried
    if true["lines"]:
        lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
        marked = {number for number, line in enumerate(lines, 1) if line.endswith("# <- origin")}
        assert {site.line for site in finding.sites if site.role == "origin"} <= marked


@pytest.mark.parametrize("name", TRUTH)
def test_its_twin_gives_no_error(name: str) -> None:
    found = run(name, repaired=1).findings
    allowed = TRUTH[name].get("twin_also", ())
    assert [one.message for one in found if one.severity is Severity.ERROR and one.code not in allowed] == []
