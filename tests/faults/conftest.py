"""Each test starts from one random state, and must leave PyTorch as it found it."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("YOLO_OFFLINE", "1")
sys.path.append(str(Path(__file__).parents[1] / "core"))

from loops import traces_left


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = traces_left()
    yield
    gc.collect()
    after = traces_left()
    torch.set_num_threads(threads)
    assert {name: value for name, value in after.items() if value != before[name]} == {}
