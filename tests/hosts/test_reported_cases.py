"""Reported failures in their hosts: each is named exactly, and trains after the printed fix."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import score


def cases() -> Iterator[Any]:
    for name in score.IN_HOSTS:
        try:
            found = import_module(f"cases.{name}").CASES
        except ModuleNotFoundError as error:
            yield pytest.param(name, "", id=name, marks=pytest.mark.skip(f"{error.name} is not installed"))
        else:
            yield from (pytest.param(name, case.id, id=case.id) for case in found)


@cache
def entries(name: str) -> dict[str, score.Entry]:
    """A file's cases run in one process, for the first of them that asks."""
    return score.run_apart(name, ())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "id"), list(cases()))
def test_case_is_right(name: str, id: str) -> None:
    entry = entries(name)[id]
    if "left_out" in entry:
        pytest.skip(entry["left_out"])
    assert entry["wrong"] == {}
