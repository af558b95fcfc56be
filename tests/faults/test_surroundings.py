"""Faults that come from outside: a full disk, a folder that is none, a logger that fails, and one on top of another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import same
from programs import Net, batches, loop, step

from ampcheck import AmpChecker

TRAINS = loop(Net)


def trained(said: list[str] | None, **options: Any) -> Any:
    torch.manual_seed(0)
    return TRAINS(contextlib.nullcontext, said, [], **options)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path: Path) -> None:
    expected = trained(None)
    said: list[str] = []
    with full_disk():
        found = trained(said, report=tmp_path / "report.json")
    assert same(found, expected)
    assert len([line for line in said if "could not be written" in line]) == 1
    assert not any("switched itself off" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    assert same(trained(said, report=tmp_path / "file" / "report.json"), trained(None))
    assert len([line for line in said if "could not be written" in line]) == 1


@pytest.mark.filterwarnings("always")
def test_fault_on_top_of_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither can what is wrong be told, nor what was opened be closed in order."""

    def fail(*_: Any) -> None:
        raise OSError("no more of it")

    def run(checker: AmpChecker | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        if checker is not None:
            checker.attach(model, optimizers=[optimizer], emit=fail)
        for batch in batches(2, 8):
            with checker.training_step() if checker is not None else contextlib.nullcontext():
                losses.append(step(model, optimizer, batch))
        if checker is not None:
            checker.detach()
        return [*losses, *model.parameters()]

    expected = run(None)
    monkeypatch.setattr("ampcheck.run.Run.abandon", fail)
    with pytest.warns(RuntimeWarning, match="AmpCheck switched itself off: OSError: no more of it") as caught:
        found = run(AmpChecker(report=False))
    assert same(found, expected)
    assert len([warning for warning in caught if "AmpCheck" in str(warning.message)]) == 1
