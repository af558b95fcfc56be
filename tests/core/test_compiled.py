"""Compiled models are watched from outside: they compile no more often, compute the same, and the report says so."""

from __future__ import annotations

import contextlib

import pytest
import torch
from loops import CNN, MACHINE, evaluate, found, same, sgd, train
from torch import nn
from torch._dynamo.testing import CompileCounter

import ampcheck


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_function(model, backend):
    return torch.compile(model, backend=backend)


def by_method(model, backend):
    model.compile(backend=backend)
    return model


def of_a_child(model, backend):
    model.head = torch.compile(model.head, backend=backend)
    return model


def of_a_child_by_method(model, backend):
    model.conv.compile(backend=backend)
    return model


FORMS = [by_function, by_method, of_a_child, of_a_child_by_method]


def run(compiled, guard, backend, *, compile_first=True):
    torch.manual_seed(0)
    model = CNN()
    optimizer = sgd(model)
    if compile_first:
        model = compiled(model, backend)
    with guard(model, optimizer):
        if not compile_first:
            model = compiled(model, backend)
        losses = train(model, optimizer, steps=3)
        outputs = evaluate(model)
        losses += train(model, optimizer, steps=1)
    return losses, outputs, list(model.state_dict().values())


def alone(model, optimizer):
    return contextlib.nullcontext()


@pytest.mark.parametrize("compiled", FORMS)
def test_as_many_frames_and_the_same_results(compiled):
    told: list[str] = []
    watches = []

    def guard(model, optimizer):
        watches.append(ampcheck.watch(model, optimizer=optimizer, emit=told.append, ignore=MACHINE))
        return watches[0]

    plain, watched = CompileCounter(), CompileCounter()
    expected = run(compiled, alone, plain)
    torch._dynamo.reset()
    assert same(expected, run(compiled, guard, watched))
    assert watched.frame_count == plain.frame_count
    # PyTorch 2.4 compiles no module of its own that is called by itself.
    assert plain.frame_count or compiled is of_a_child_by_method
    assert watched.op_count == plain.op_count
    report = watches[0].report
    assert report.trace.model.compiled
    assert report.trace.training.calls
    assert report.findings == ()
    assert "what runs inside compiled code is not watched" in set(report.not_judged.values())
    assert {"AMP106", "AMP110", "AMP208", "AMP210"} <= set(report.not_judged)
    assert "AMP101" not in report.not_judged
    assert any("not judged" in line and "compiled code" in line for line in told)


def test_compiled_inside_the_watch():
    plain, watched = CompileCounter(), CompileCounter()
    expected = run(by_method, alone, plain, compile_first=False)
    torch._dynamo.reset()
    guard = lambda model, optimizer: ampcheck.watch(model, optimizer=optimizer, emit=lambda text: None)  # noqa: E731
    assert same(expected, run(by_method, guard, watched, compile_first=False))
    assert watched.frame_count == plain.frame_count > 0


def test_autocast_around_a_compiled_model_is_judged():
    model = by_function(CNN(), "eager")
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    with ampcheck.watch(model, optimizer=optimizer, scaler=scaler, emit=lambda text: None, ignore=MACHINE) as watch:
        train(model, optimizer, dtype=None, scaler=scaler)
    assert found(watch.report) == {"AMP101": "warning"}
    assert "compiled" in watch.report.findings[0].message


def test_names_of_a_compiled_model_are_the_users():
    model = by_function(CNN(), "eager")
    with ampcheck.watch(model, emit=lambda text: None) as watch:
        train(model, sgd(model))
    assert watch.report.trace.model.type == "CNN"
    assert [module.name for module in watch.report.trace.model.modules][:2] == ["", "conv"]
    assert not [tensor for tensor in watch.report.trace.model.tensors if "_orig_mod" in tensor.name]


def test_uncompiled_model_beside_a_compiled_one():
    """It is watched like any other, and what is compiled does not compile again."""
    counter = CompileCounter()
    other = torch.compile(nn.Linear(8, 8), backend=counter)
    other(torch.ones(1, 8))
    frames = counter.frame_count
    model = CNN()
    with ampcheck.watch(model, emit=lambda text: None, ignore=MACHINE) as watch:
        losses = []
        train(model, sgd(model), steps=1, after_step=lambda step: losses.append(other(torch.ones(1, 8))))
    assert counter.frame_count == frames
    assert watch.report.trace.training.calls
    assert watch.report.trace.uncompiled
    assert watch.report.findings == ()


@pytest.mark.parametrize("compiled", FORMS)
def test_found_by_itself(compiled):
    """As `ampcheck run` does: no model is given, and it compiles after the watch has begun."""
    plain, watched = CompileCounter(), CompileCounter()
    expected = run(compiled, alone, plain, compile_first=False)
    torch._dynamo.reset()
    watches = []

    def guard(model, optimizer):
        watches.append(ampcheck.watch(None, emit=lambda text: None, ignore=MACHINE))
        return watches[0]

    assert same(expected, run(compiled, guard, watched, compile_first=False))
    assert watched.frame_count == plain.frame_count
    assert watches[0].report.trace.model.type == "CNN"
    assert watches[0].report.trace.training.calls


def test_compiled_function_around_the_model_is_not_broken():
    """The call of the model is inside what is compiled: seen or not, it compiles as one graph still."""
    model = CNN()
    step = torch.compile(lambda images: model(images).sum(), backend="eager", fullgraph=True)
    with ampcheck.watch(None, emit=lambda text: None, ignore=MACHINE) as watch:
        for _ in range(3):
            step(torch.ones(2, 1, 8, 8)).backward()
    assert watch.report.findings == ()


def test_compiled_helper_beside_the_watched_model_is_not_broken():
    """Modules that are no part of the model compile while its step is watched."""
    other = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    helper = torch.compile(lambda x: other(x).sum(), backend="eager", fullgraph=True)
    model = CNN()
    with ampcheck.watch(model, emit=lambda text: None, ignore=MACHINE) as watch:
        train(model, sgd(model), steps=3, after_step=lambda step: helper(torch.ones(1, 8)))
    assert watch.report.trace.training.calls
    assert watch.report.trace.internal_error is None
