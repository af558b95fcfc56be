"""Healthy look-alikes give nothing, and train to the same bits as without the probe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case
from cases.inplace_healthy import CASES
from inplace.conftest import Recorder
from torch import nn

from ampcheck.observe.probes.dispatch import DispatchProbe


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_nothing_is_said(case: Case, recorder: Recorder) -> None:
    case.run(recorder)

    assert recorder.error is None
    assert recorder.findings == []


class Trained:
    """A guard that keeps the model and says what has become of it."""

    def __init__(self, *, watched: bool) -> None:
        self.watched = watched
        self.tensors: dict[str, torch.Tensor] = {}
        self.versions: list[int] = []

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, **_: Any) -> Iterator[None]:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if not isinstance(parameter, nn.UninitializedParameter):
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        with DispatchProbe(model, lambda: None) if self.watched else contextlib.nullcontext():
            yield
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.tensors |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
        self.random = torch.get_rng_state()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_trains_to_the_same_bits(case: Case) -> None:
    torch.manual_seed(0)
    plain, watched = Trained(watched=False), Trained(watched=True)
    case.run(plain)
    torch.manual_seed(0)
    case.run(watched)

    assert plain.tensors.keys() == watched.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert torch.equal(tensor, watched.tensors[name]), name
    assert plain.versions == watched.versions
    assert torch.equal(plain.random, watched.random)
