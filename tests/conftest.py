"""Tests must not see what others compiled: a process in which anything is compiled is watched with less."""

from __future__ import annotations

import pytest
import torch

from ampcheck.observe.walk import anything_compiled


@pytest.fixture(autouse=True)
def nothing_is_compiled() -> None:
    # Ahead of the test, not behind it: programs run while the tests are collected, too.
    if anything_compiled():
        torch._dynamo.reset()
