"""The probe of scaler calls sees their order, changes no number, and puts everything back."""

from __future__ import annotations

import inspect
import sys
import types
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases.scaler_crashes import Net, loss_of
from cases.training import rows, sgd
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import _global_optimizer_post_hooks

from ampcheck.observe.probes.scaler import ScalerProbe
from ampcheck.rules.loss_scale_collapse import loss_scale_collapse
from ampcheck.trace import ScalerCall, StepTrace, Trace


def patched() -> tuple[Any, ...]:
    scaler = torch.amp.GradScaler
    listened = (scaler.scale, scaler.get_scale, scaler.unscale_, scaler.step, scaler.update, torch.autograd.backward)
    clipping = (clip_grad_norm_, torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad.clip_grad_value_)
    functions: tuple[Any, ...] = (*listened, torch.optim.Optimizer._optimizer_step_code, *clipping)
    return (*((one, inspect.unwrap(one).__code__) for one in functions), dict(_global_optimizer_post_hooks))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    clip_grad_norm_((parameter for parameter in model.parameters()), 1.0)
    scaler.step(optimizer)
    scaler.update()


def test_sees_the_calls_in_order() -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with ScalerProbe() as probe:
        step(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0))

    assert [call.op for call in probe.calls] == ["scale", "backward", "unscale", "clip", "step", "update"]
    assert [call.scaled for call in probe.calls] == [None, True, None, False, None, None]
    assert [call.optimizers for call in probe.calls if call.op in ("unscale", "clip", "step")] == [(0,)] * 3
    assert next(call for call in probe.calls if call.op == "step").skipped is False
    assert {call.site.file for call in probe.calls if call.site} == {__file__}


def test_knows_a_scaled_loss_by_its_factor() -> None:
    """Where the lookup of ``scaler.scale`` came before the probe."""
    model = Net()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    scale = scaler.scale
    with ScalerProbe() as probe:
        scale(loss_of(model)).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    seen = {call.op: call.scaled for call in probe.calls if call.op in ("backward", "clip")}
    assert seen == {"backward": True, "clip": True}


def test_sees_nothing_without_a_scaler() -> None:
    with ScalerProbe() as probe:
        Net()(rows()).sum().backward()

    assert probe.calls == ()


def test_changes_no_number() -> None:
    results = []
    for probe in (None, ScalerProbe()):
        torch.manual_seed(0)
        model = Net()
        optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
        for _ in range(3):
            if probe is not None:
                with probe:
                    step(model, optimizer, scaler)
            else:
                step(model, optimizer, scaler)
        results.append([*model.parameters(), torch.tensor(scaler.get_scale())])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dies", [False, True])
def test_puts_everything_back(dies: bool) -> None:
    before = patched()
    imported = types.ModuleType("users_module")
    imported.clip_grad_norm_ = clip_grad_norm_  # type: ignore[attr-defined]
    sys.modules["users_module"] = imported
    try:
        with pytest.raises(ZeroDivisionError) if dies else nullcontext(), ScalerProbe():
            assert patched() != before
            assert imported.clip_grad_norm_ is clip_grad_norm_  # type: ignore[attr-defined]
            if dies:
                raise ZeroDivisionError
    finally:
        del sys.modules["users_module"]
    assert patched() == before


def test_keeps_no_graph_alive() -> None:
    model = Net()
    scaler = torch.amp.GradScaler("cpu")
    with ScalerProbe() as probe:
        loss = scaler.scale(loss_of(model))
        dead = weakref.ref(loss)
        loss.backward()
        del loss
        assert dead() is None
    assert probe._scaled_nodes == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 raises again with the traceback it caught")
def test_the_tracebacks_of_the_user_have_no_frame_of_ours() -> None:
    from ampcheck.source.lines import is_ours

    model = Net().half()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="unscale FP16") as caught, ScalerProbe():
        step(model, optimizer, scaler)

    assert [entry for entry in caught.traceback if is_ours(str(entry.path))] == []


@pytest.mark.parametrize(("skipped", "findings"), [((True,) * 3, 1), ((True,) * 2, 0), ((True, True, False), 0)])
def test_a_collapse_is_three_skipped_steps_of_three(skipped: tuple[bool, ...], findings: int) -> None:
    calls = tuple(ScalerCall("step", None, (0,), skipped=one) for one in skipped)

    assert len(list(loss_scale_collapse(Trace(training=StepTrace(scaling=calls))))) == findings


def test_leaves_saved_tensors_under_hooks_alone() -> None:
    """To look at one runs its hooks: a checkpoint would compute its forward again, and update its buffers."""
    unpacked: list[torch.Tensor] = []

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        unpacked.append(tensor)
        return tensor

    model = Net()
    loss = loss_of(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        product = loss * torch.tensor(2.0)
    with ScalerProbe():
        (product + 1.0).backward()

    assert len(unpacked) == 1
