from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from ampcheck import AmpChecker, Precision
from ampcheck.rules.rule import Finding
from ampcheck.trace import Failure, Trace


class Recorder:
    """Runs a case's region under a checker, and keeps what was raised and what was found."""

    def __init__(self, *, watched: bool) -> None:
        self.watched = watched
        self.error: BaseException | None = None
        self.findings: tuple[Finding, ...] = ()
        self.trace = Trace()

    @contextmanager
    def __call__(
        self,
        model: nn.Module,
        *,
        precision: Precision | None = None,
        optimizers: tuple[Any, ...] = (),
        scaler: Any = None,
        phase: str = "training_step",
    ) -> Iterator[None]:
        checker = AmpChecker(watch_steps=int(self.watched), report=False)
        checker.attach(model, precision=precision, optimizers=optimizers, scaler=scaler, emit=lambda text: None)
        step = checker.evaluation_step() if phase == "validation_step" else checker.training_step()
        try:
            with step:
                yield
        except Exception as error:  # noqa: BLE001 (that is what the case is about)
            self.error = error
            checker.diagnose(error, phase=phase)
        assert checker.report is not None
        assert checker.report.trace.internal_error is None, checker.report.trace.internal_error
        self.findings, self.trace = checker.report.findings, checker.report.trace
        checker.detach()

    @property
    def failure(self) -> Failure:
        assert self.trace.failure is not None, "nothing was raised"
        return self.trace.failure

    def found(self, code: str | None) -> list[Finding]:
        return [finding for finding in self.findings if finding.code == code]


@pytest.fixture(params=[True, False], ids=["watched", "unwatched"])
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Recorder(watched=request.param)


@pytest.fixture
def record() -> Iterator[type[Recorder]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Recorder
