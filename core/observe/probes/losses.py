"""The values that backward passes begin with."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch.autograd import graph as autograd_graph

from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone


class LossProbe:
    """Notes the sum over all roots of each backward pass that the thread which entered it begins. Reading it waits for
    the device: for steps that are run again."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.values: list[float] = []
        self._thread = threading.get_ident()
        self._listening = Listening()

    def __enter__(self) -> LossProbe:
        self._listening.to(autograd_graph._engine_run_backward, before=self._begins)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()

    @contained
    def _begins(self, roots: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() == self._thread and torch._C._current_graph_task_id() == -1:
            with alone():
                self.values.append(sum(float(root.double().sum()) for root in roots))
