"""After the watched steps: at most one Python call of ours a batch, and nothing else."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from loops import CNN, evaluate, sgd, traces_left, train

import ampcheck
import ampcheck.integrations

OURS = tuple(str(Path(package.__file__).parent) + os.sep for package in (ampcheck, ampcheck.integrations))


class Calls:
    """Counts the Python calls into AmpCheck's files, by function, while it is open."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.all = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _seen(self, frame, event, arg):
        if event == "call":
            self.all += 1
            file = frame.f_code.co_filename
            if file.startswith(OURS):
                self.counts[frame.f_code.co_name] += 1


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "never evaluated"])
def test_plain_loop_makes_no_call_of_ours(evaluated):
    model = CNN()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    before = traces_left()
    with ampcheck.watch(model, optimizer=optimizer, scaler=scaler, emit=lambda text: None):
        with Calls() as watched:
            train(model, optimizer, steps=2, dtype=torch.float16, scaler=scaler)
            if evaluated:
                evaluate(model, torch.float16)
        left = traces_left()
        with Calls() as steady:
            train(model, optimizer, steps=10, dtype=torch.float16, scaler=scaler)
            if evaluated:
                evaluate(model, torch.float16)
    assert watched.counts["call"] >= 7, "calls of ours would have been counted"
    assert steady.all > 100
    assert steady.counts == {}
    if evaluated:
        assert left == before
    else:
        assert {name for name in left if left[name] != before[name]} == {"codes of Module"}


def test_a_hosts_event_makes_one_call(monkeypatch):
    """What an adapter does a batch: ask for the step's probes, and get the shared null context."""
    model = CNN()
    checker = ampcheck.AmpChecker(report=False)
    checker.attach(model, emit=lambda text: None)
    with checker.training_step():
        train(model, sgd(model), steps=1)
    with checker.evaluation_step():
        evaluate(model)
    contexts = set()
    for enter in (checker.training_step, checker.evaluation_step):
        with Calls() as steady:
            for _ in range(10):
                context = enter()
                with context:
                    pass
                contexts.add(id(context))
        assert steady.counts == {enter.__name__: 10}
    assert len(contexts) == 1
    checker.detach()


def test_steady_state_does_not_copy_from_the_device(monkeypatch):
    """No value of a tensor is read after the watched step: on a GPU each would wait for the device."""
    read: list[str] = []
    model = CNN()
    optimizer = sgd(model)
    train(model, optimizer, steps=1)
    optimizer.zero_grad()
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "equal"):
        original = getattr(torch.Tensor, name)

        def seen(self, *args, _name=name, _original=original, **kwargs):
            caller = sys._getframe(1).f_code
            # A function mode passes on what the program calls.
            if caller.co_filename.startswith(OURS) and caller.co_name != "_run":
                read.append(f"{_name} in {caller.co_filename}:{caller.co_name}")
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, seen)
    with ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None):
        train(model, optimizer, steps=2)
        evaluate(model)
        read.clear()
        train(model, optimizer, steps=2)
        evaluate(model)
        # At the end the weights are looked at.
        steady = list(read)
    assert steady == []
