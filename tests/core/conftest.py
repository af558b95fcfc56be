"""Every test of the core starts from the same random state, and must leave PyTorch as it found it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from loops import traces_left


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    before = traces_left()
    yield
    after = traces_left()
    assert {name: value for name, value in after.items() if value != before[name]} == {}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
