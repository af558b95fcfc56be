"""Runs cases under the probes of autograd, and judges what they saw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ampcheck.failure import examine
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.probes.saved_tensors import graph_trace
from ampcheck.observe.walk import walk
from ampcheck.rules import RULES
from ampcheck.rules.rule import Finding
from ampcheck.trace import Trace


class Recorder:
    """A guard: the region runs under the probes; what it raises is examined and held back."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.trace = Trace()
        self.findings: list[Finding] = []

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, **_: Any) -> Iterator[None]:
        modules = ModuleProbe(model, "cpu", AutocastProbe())
        probe = DispatchProbe(model, lambda: modules.current)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with modules, probe:
                yield
        except Exception as error:  # noqa: BLE001 - whatever the case raises is what it is about
            self.error = error
        finally:
            torch.set_num_threads(threads)
        failure = examine(self.error, model=model, phase="training_step", step=0) if self.error is not None else None
        self.trace = Trace(model=walk(model), failure=failure, graph=graph_trace(probe, self.error))
        self.findings = [
            finding
            for rule in RULES
            if rule.code.startswith("AMP4") and rule.missing(self.trace) is None
            for finding in rule(self.trace)
        ]
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
