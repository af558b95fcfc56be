"""What the write probe owes to the training that it watches."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from cases import inplace_helper
from cases.inplace_saved import helper_in_another_file
from inplace.conftest import Recorder
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.saved_tensors import graph_trace


class Counter(TorchDispatchMode):
    """A user's own mode."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


def probe_of(model: nn.Module) -> DispatchProbe:
    return DispatchProbe(model, lambda: None)


def failing_step(model: nn.Module) -> None:
    hidden = F.relu(model(torch.ones(2, 4)))
    hidden += 1
    hidden.sum().backward()


def test_enters_and_leaves_wherever_others_begin_and_end() -> None:
    model = nn.Linear(4, 2)

    def seen_by_others(probe: DispatchProbe | None) -> list[int]:
        first, second = Counter(), Counter()
        mine = [] if probe is None else [probe]
        with contextlib.ExitStack() as users:
            users.enter_context(first)
            if probe is not None:
                probe.__enter__()
            users.enter_context(second)
            assert _get_current_dispatch_mode_stack() == [*mine, first, second]
            model(torch.ones(2, 4)).exp().sum().backward()
            if probe is not None:
                probe.__exit__(None, None, None)
            assert _get_current_dispatch_mode_stack() == [first, second]
        assert _get_current_dispatch_mode_stack() == []
        return [first.ops, second.ops]

    seen_by_others(None)
    probe = probe_of(model)
    assert seen_by_others(probe) == seen_by_others(None)
    assert probe.error is None


def test_left_after_the_block_it_was_entered_in() -> None:
    model = nn.Linear(4, 2)
    probe = probe_of(model)
    with FlopCounterMode(display=False):
        probe.__enter__()
        model(torch.ones(2, 4)).sum().backward()
    assert _get_current_dispatch_mode_stack() == [probe]
    probe.__exit__(None, None, None)
    assert _get_current_dispatch_mode_stack() == []


def test_nothing_stays_behind_when_a_step_fails_inside_a_failure() -> None:
    model = nn.Linear(4, 2)
    tables = [optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks]
    before = [len(table) for table in tables]
    try:
        with probe_of(model):
            failing_step(model)
    except RuntimeError:
        with pytest.raises(RuntimeError), probe_of(model):
            failing_step(model)
    assert _get_current_dispatch_mode_stack() == []
    assert [len(table) for table in tables] == before


def test_an_optimizer_that_raises_in_its_step() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("broken")

    model = nn.Linear(4, 2)
    optimizer = Broken(model.parameters(), lr=0.1)
    with probe_of(model) as probe, pytest.raises(ValueError, match="broken"):
        optimizer.step()
    assert probe.error is None
    assert _get_current_dispatch_mode_stack() == []


def test_closures_are_watched() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    probe = probe_of(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        hidden = F.relu(model(torch.ones(2, 4)))
        hidden += 1
        loss = hidden.sum()
        loss.backward()
        return loss

    with probe, pytest.raises(RuntimeError) as raised:
        optimizer.step(closure)
    (stale,) = graph_trace(probe, raised.value).stale
    assert stale.writes[0].site is not None
    assert stale.writes[0].site.code == "hidden += 1"


def test_the_error_is_pytorchs_own() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(RuntimeError) as plain:
        failing_step(model)
    with pytest.raises(RuntimeError) as watched, probe_of(model):
        failing_step(model)
    assert str(watched.value) == str(plain.value)


def test_a_second_backward_raises_the_same_after_the_graph_was_read() -> None:
    model = nn.Linear(4, 2)
    with probe_of(model) as probe:
        hidden = F.relu(model(torch.ones(2, 4)))
        hidden += 1
        loss = hidden.sum()
        with pytest.raises(RuntimeError) as first:
            loss.backward()
        assert len(graph_trace(probe, first.value).stale) == 1
    with pytest.raises(RuntimeError) as second:
        loss.backward()
    assert str(second.value) == str(first.value)


WRITES: dict[str, Callable[[list[torch.Tensor]], object]] = {
    "list op": lambda x: torch._foreach_mul_(x, 2),
    "list op with a list": lambda x: torch._foreach_add_(x, [t.detach().clone() for t in x]),
    "list copy": lambda x: torch._foreach_copy_(x, [t.detach() + 1 for t in x]),
    "method": lambda x: x[0].mul_(2),
    "index": lambda x: x[0].__setitem__((0, 0), 3.0),
    "mask": lambda x: x[0].masked_fill_(x[0] > 0, 1.0),
    "view": lambda x: x[0].view(-1)[1:].add_(1),
    "no grad": lambda x: torch.no_grad()(lambda: x[0].zero_())(),
    "dropout": lambda x: F.dropout(x[0], 0.5, inplace=True),
    "random": lambda x: torch.no_grad()(lambda: nn.init.normal_(x[0]))(),
    "detached": lambda x: x[0].detach().fill_(1),
    "data": lambda x: x[0].data.fill_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_versions_count_as_they_do_without_it(write: Callable[[list[torch.Tensor]], object]) -> None:
    def versions() -> list[int]:
        leaves = [torch.ones(2, 2, requires_grad=True) for _ in range(2)]
        tensors = [leaf * 2 for leaf in leaves]
        write(tensors)
        return [tensor._version for tensor in tensors]

    plain = versions()
    with probe_of(nn.Linear(1, 1)) as probe:
        assert versions() == plain
    assert probe.error is None


def test_tensors_die_as_early_as_without_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with probe_of(model):
        hidden = model(torch.ones(2, 4)).exp()
        references = [weakref.ref(hidden), weakref.ref(hidden.untyped_storage())]
        memory = hidden.untyped_storage()._weak_ref()
        loss = hidden.sum()
        del hidden
        assert references[0]() is None
        loss.backward()
        del loss
        assert torch.UntypedStorage._expired(memory)
    torch.UntypedStorage._free_weak_ref(memory)


def test_the_probe_dies_with_its_step() -> None:
    model = nn.Linear(4, 2)
    probe = probe_of(model)
    with probe:
        model(torch.ones(2, 4)).sum().backward()
    reference = weakref.ref(probe)
    del probe
    gc.collect()
    assert reference() is None


def test_higher_order_ops_pass_through() -> None:
    while_loop = torch.ops.higher_order.while_loop
    with probe_of(nn.Linear(1, 1)) as probe:
        (count,) = while_loop(lambda i: i < 3, lambda i: (i + 1,), (torch.tensor(0),), ())
    assert int(count) == 3
    assert probe.error is None


def test_subclasses_that_define_torch_function(recorder: Recorder) -> None:
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            assert func is not torch.Tensor.untyped_storage
            return super().__torch_function__(func, types, args, kwargs or {})

    model = nn.Linear(4, 2)
    with recorder(model):
        F.relu(model(torch.ones(2, 4).as_subclass(Named))).sum().backward()
    assert recorder.findings == []


def test_helper_in_another_file(recorder: Recorder) -> None:
    helper_in_another_file(recorder, 0)

    with open(inplace_helper.__file__, encoding="utf-8") as file:
        (line,) = [number for number, text in enumerate(file, 1) if text.rstrip().endswith("# <- helper: write")]
    (finding,) = recorder.findings
    assert [(site.file, site.line) for site in finding.sites if site.role == "write"] == [
        (inplace_helper.__file__, line)
    ]


def test_all_stale_tensors_are_listed(recorder: Recorder) -> None:
    model = nn.Linear(4, 4)
    with recorder(model):
        first = model(torch.ones(2, 4)).sigmoid()
        second = first.exp()
        first += 1
        second += 1
        (first * second).sum().backward()

    (finding,) = recorder.findings
    assert finding.code == "AMP401"
    assert {(other["node"], other["slot"]) for other in finding.evidence["also_stale"]} == {
        ("SigmoidBackward0", "result")
    }
    assert "1 more saved tensor is stale" in finding.message


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo")
@pytest.mark.filterwarnings("ignore")
def test_buffers_that_data_parallel_training_broadcasts(recorder: Recorder, tmp_path) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.scale

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Norm())
        with recorder(model):
            (model(torch.ones(2, 4)) + model(torch.zeros(2, 4))).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    # Newer PyTorch writes past the version counter: one process sends itself what it has, and nothing changes.
    if recorder.error is None:
        assert recorder.findings == []
    else:
        (finding,) = recorder.findings
        assert (finding.code, finding.evidence["tensor"]) == ("AMP407", "scale")
        assert "the buffer broadcast of DistributedDataParallel" in finding.message
