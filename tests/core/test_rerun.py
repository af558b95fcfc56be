"""Loops as people write them, which fail at a later step: their last statements, run again, name write and save."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ampcheck

ROWS = [torch.linspace(-1, 1, 32).reshape(4, 8) + i for i in range(6)]
FROM = 3
PROGRAMS: dict[str, Callable[..., None]] = {}


def program(function: Callable[..., None]) -> Callable[..., None]:
    PROGRAMS[function.__name__.strip("_")] = function
    return function


class Net(nn.Module):
    """Sound in itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class Late(Net):
    """Fails from its fourth training call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.body(x).tanh()  # <- save: late
        if self.calls > FROM:
            h.add_(1)  # <- write: late
        return self.head(h)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01)


@program
def over_a_generator(model: Net) -> None:
    def loader() -> Iterator[tuple[int, Tensor]]:
        yield from enumerate(ROWS)

    optimizer = sgd(model)
    for i, x in loader():
        optimizer.zero_grad()
        y = model(x).sigmoid()  # <- save
        if i >= FROM:
            y *= 2  # <- write
        y.sum().backward()
        optimizer.step()


@program
def a_while_loop_over_an_iterator(model: Net) -> None:
    optimizer, batches, i = sgd(model), iter(ROWS), 0
    while True:
        try:
            x = next(batches)
        except StopIteration:
            break
        y = model(x).exp()  # <- save
        if i >= FROM:
            y.clamp_(max=1)  # <- write
        loss = y.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        i += 1


@program
def steps_in_a_function(model: Net) -> None:
    def train_step(x: Tensor, late: bool) -> float:
        out = model(x)
        probabilities = out.softmax(-1)  # <- save
        if late:
            probabilities[:, 0] = 0  # <- write
        loss = (probabilities * out).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    optimizer = sgd(model)
    losses = []
    for i, x in enumerate(ROWS):
        losses.append(train_step(x, i >= FROM))


@program
def a_trainer_of_the_users_own(model: Net) -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.optimizer, self.__steps = model, sgd(model), 0
            self.history: list[float] = []

        def forward(self, x: Tensor) -> None:
            self.features = self.model(x).sigmoid()  # <- save
            if self.__steps >= FROM:
                self.features.mul_(2)  # <- write
            self.loss = self.features.mean()

        def optimize(self) -> None:
            self.optimizer.zero_grad()
            self.loss.backward()
            self.optimizer.step()
            self.__steps += 1
            self.history.append(self.loss.item())

        def fit(self, rows: list[Tensor]) -> None:
            for epoch in range(2):
                for x in rows[epoch:]:
                    self.forward(x)
                    self.optimize()

    Trainer(model).fit(ROWS)


@program
def gradient_accumulation(model: Net) -> None:
    optimizer = sgd(model)
    for i, (a, b) in enumerate(itertools.pairwise(ROWS)):
        optimizer.zero_grad()
        for x in (a, b):
            y = torch.sqrt(model(x).square() + 1)  # <- save
            if i >= FROM:
                y += 1  # <- write
            (y.mean() / 2).backward()
        optimizer.step()


@program
def a_sum_of_losses(model: Net) -> None:
    optimizer = sgd(model)
    for i, x in enumerate(ROWS):
        total = torch.zeros(())
        for part in x.split(2):
            y = model(part).tanh()  # <- save
            if i >= FROM:
                y.neg_()  # <- write
            total = total + y.sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


@program
def losses_in_a_dict(model: Net) -> None:
    optimizer = sgd(model)
    for i, x in enumerate(ROWS):
        out = model(x)
        losses = {"a": out.square().mean()}
        gate = out.sigmoid()  # <- save
        losses["b"] = gate.mean()
        if i >= FROM:
            gate.zero_()  # <- write
        optimizer.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()


@program
def under_autocast_and_a_scaler(model: Net) -> None:
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    with contextlib.suppress(ZeroDivisionError), torch.autocast("cpu", dtype=torch.bfloat16):
        for i, x in enumerate(ROWS):
            h = F.silu(model(x)).relu()  # <- save
            if i >= FROM:
                h.mul_(0.5)  # <- write
            loss = h.float().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


@program
def tried_and_told(model: Net) -> None:
    optimizer = sgd(model)
    try:
        for i, x in enumerate(ROWS):
            try:
                y = model(x).exp()  # <- save
                if i >= FROM:
                    y.log_()  # <- write
                y.sum().backward()
            finally:
                optimizer.zero_grad()
    except KeyError:
        raise AssertionError from None


@program
def a_decorated_step(model: Net) -> None:
    @torch.enable_grad()
    def closure(x: Tensor, late: bool) -> Tensor:
        y = model(x).sigmoid()  # <- save
        if late:
            y.sub_(0.5)  # <- write
        loss = y.square().sum()
        loss.backward()
        return loss

    optimizer = sgd(model)
    with torch.no_grad():
        for i, x in enumerate(ROWS):
            optimizer.zero_grad()
            optimizer.step(lambda x=x, i=i: closure(x, i >= FROM))  # type: ignore[misc]


@program
def in_a_module_late(model: Net) -> None:
    optimizer = sgd(model)
    for x in ROWS:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@program
def in_a_coroutine_late(model: Net) -> None:
    async def train() -> None:
        optimizer = sgd(model)
        for x in ROWS:
            await asyncio.sleep(0)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    asyncio.run(train())


@program
def a_state_carried_on(model: Net) -> None:
    optimizer = sgd(model)
    state = torch.zeros(4, 8)
    for i, x in enumerate(ROWS):
        state = torch.tanh(model(x) + state.detach())  # <- save
        out = state.exp()
        if i >= FROM:
            state.fill_(0.5)  # <- write
        optimizer.zero_grad()
        (out.mean() + state.mean()).backward()
        optimizer.step()


@program
def two_networks(model: Net) -> None:
    critic = nn.Linear(8, 1)
    optimizers = sgd(model), sgd(critic)
    for i, x in enumerate(ROWS):
        fake = model(x)
        real_score, fake_score = critic(x), critic(fake)
        gap = (fake_score - real_score).sigmoid()  # <- save
        if i >= FROM:
            gap += 1  # <- write
        for optimizer in optimizers:
            optimizer.zero_grad()
        gap.mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@program
def through_a_helper(model: Net) -> None:
    def squash_(t: Tensor) -> None:
        t.clamp_(-0.1, 0.1)  # <- write

    optimizer = sgd(model)
    for i, x in enumerate(ROWS):
        h = model(x).tanh()  # <- save
        if i >= FROM:
            squash_(h)
        optimizer.zero_grad()
        h.sum().backward()
        optimizer.step()


@program
def a_view_of_it(model: Net) -> None:
    optimizer = sgd(model)
    for i, x in enumerate(ROWS):
        h = model(x).sigmoid()  # <- save
        top = h[:2]
        if i >= FROM:
            top.mul_(3)  # <- write
        optimizer.zero_grad()
        h.sum().backward()
        optimizer.step()


@program
def a_write_by_what_is_given_no_tensor(model: Net) -> None:
    class Averager:
        @torch.no_grad()
        def pull(self, decay: float) -> None:
            model.head.weight.mul_(decay)  # <- write

    optimizer, averager = sgd(model), Averager()
    for i, x in enumerate(ROWS):
        hidden = torch.relu(model.body(x)).square()
        loss = torch.mm(hidden, model.head.weight).mean()  # <- save
        if i >= FROM:
            averager.pull(0.9)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def marked(function: Callable[..., None], mark: str) -> int:
    lines, first = inspect.getsourcelines(function)
    found = [first + i for i, text in enumerate(lines) if text.rstrip().endswith(f"# <- {mark}")]
    if not found:
        text = Path(__file__).read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(text, 1) if line.rstrip().endswith(f"# <- {mark}: late")]
    (line,) = found
    return line


@pytest.mark.parametrize("watched", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_write_and_save_are_named(name: str, watched: int) -> None:
    torch.manual_seed(0)
    model = Late() if name.endswith("late") else Net()
    options: dict[str, Any] = {"watch_steps": watched, "report": False, "emit": lambda _: None}
    with pytest.raises(RuntimeError, match="inplace operation"), ampcheck.watch(model, **options) as watch:
        PROGRAMS[name](model)
    assert watch.report is not None
    (finding,) = (one for one in watch.report.findings if one.severity is ampcheck.Severity.ERROR)
    assert finding.code == "AMP401"
    lines = {site.role: site.line for site in finding.sites}
    assert lines == {role: marked(PROGRAMS[name], role) for role in ("write", "save")}


def test_a_loop_that_a_library_runs_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls it is a whole training, which nobody wants twice."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "hosting.py").write_text(
        "fits = []\ndef fit(model, rows):\n    fits.append(1)\n    for x in rows:\n        model(x).sum().backward()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    import hosting

    model = Late()
    with pytest.raises(RuntimeError) as caught, ampcheck.watch(model, report=False, emit=lambda _: None):
        hosting.fit(model, ROWS)
    assert hosting.fits == [1]
    assert "AMP401" in caught.value.__notes__[0]


@contextlib.contextmanager
def watched() -> Iterator[ampcheck.watch]:
    with pytest.raises(RuntimeError), ampcheck.watch(None, watch_steps=0, report=False, emit=[].append) as watch:
        yield watch


def only_finding(watch: ampcheck.watch) -> ampcheck.Finding:
    assert watch.report is not None
    (finding,) = watch.report.findings
    return finding


CARRIED = {
    "a tensor": ("state = cell(x, state)", "state = state.detach()"),
    "a tensor that begins as None": (
        "state = torch.zeros(4, 8) if state is None else state; state = cell(x, state)",
        "state = state.detach()",
    ),
    "a tuple": (
        "state = (cell(x, state[0] if i else torch.zeros(4, 8)), x)",
        "state = tuple(one.detach() for one in state)",
    ),
}


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("retained", [True, False])
def test_a_graph_that_the_step_before_left(name: str, retained: bool, tmp_path: Path) -> None:
    """The edit that the finding prints makes the script run."""
    forward, detached = CARRIED[name]
    begun = "None" if "None" in name or "tuple" in name else "torch.zeros(4, 8)"
    source = f"""
import torch

cell = torch.nn.GRUCell(8, 8)
optimizer = torch.optim.SGD(cell.parameters(), 0.01)
state = {begun}
for i, x in enumerate(torch.randn(6, 4, 8)):
    {forward}
    loss = (state[0] if isinstance(state, tuple) else state).square().mean()
    optimizer.zero_grad()
    loss.backward(retain_graph={retained})
    optimizer.step()
    if i < {FROM}:
        {detached}
"""
    file = tmp_path / "program.py"
    file.write_text(source)
    with watched() as watch:
        exec(compile(source, str(file), "exec"), {"__name__": "program"})
    finding = only_finding(watch)
    assert finding.code == ("AMP405" if retained else "AMP408")
    assert finding.edit is not None
    assert finding.edit.after == f"loss.backward(retain_graph={retained})\n{detached}"
    assert finding.tried is True
    first, second = finding.edit.after.split("\n")
    exec(compile(source.replace(first, f"{first}\n    {second}"), "repaired.py", "exec"), {})


def test_what_an_object_carries_over_is_as_before_afterwards() -> None:
    class Agent:
        def __init__(self) -> None:
            self.net, self.hidden, self.seen = nn.LSTM(8, 8), None, list[Tensor]()
            self.optimizer = sgd(self.net)

        def learn(self, x: Tensor) -> None:
            y, self.hidden = self.net(x, self.hidden)
            self.seen.append(y)
            self.optimizer.zero_grad()
            y.square().mean().backward()
            self.optimizer.step()

    agent = Agent()
    kept: list[Any] = []
    with watched() as watch:
        for x in ROWS:
            kept = [agent.hidden, agent.seen, list(agent.seen)]
            agent.learn(x)
    finding = only_finding(watch)
    assert finding.code == "AMP408"
    assert finding.fix.startswith("Detach what the step takes over")
    hidden, seen, before = kept
    assert agent.seen is seen
    assert [id(one) for one in seen[:-1]] == [id(one) for one in before]
    assert seen[-1].grad_fn is not None
    assert agent.hidden is not hidden
