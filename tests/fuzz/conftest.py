"""Profiles, counts, and a process that is left as it was found.

``pytest tests/fuzz`` runs the small profile, always the same programs; ``pytest tests/fuzz --hypothesis-profile=long``
runs thousands, others each time. ``AMPCHECK_FUZZ_EXAMPLES=N`` sets the number of examples of each test.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings

sys.path.append(str(Path(__file__).parents[1] / "core"))

from loops import traces_left

_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}
settings.register_profile("small", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile(
    "long", max_examples=int(os.environ.get("AMPCHECK_FUZZ_EXAMPLES", "3000")), phases=list(Phase), **_COMMON
)
settings.load_profile("small")

_COUNTS: dict[str, Counter[str]] = {}
_ALWAYS = ("programs", "raised", "silent", "missed", "false")


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Counts what becomes of the programs of a test; told at the end of the run."""
    counter = _COUNTS.setdefault(request.node.name, Counter())

    def count(what: str) -> None:
        counter[what] += 1

    return count


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    torch.set_num_threads(1)
    before = traces_left()
    yield
    gc.collect()
    after = traces_left()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, counter in _COUNTS.items():
        counts = {what: counter[what] for what in _ALWAYS} | dict(counter)
        told = ", ".join(f"{value} {what}" for what, value in counts.items())
        terminalreporter.write_line(f"fuzz  {name}: {told}")
