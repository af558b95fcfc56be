"""Tests must not see what others compiled: a process in which anything is compiled is watched with less."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ampcheck.walk import anything_compiled


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    yield
    if anything_compiled():
        torch._dynamo.reset()
