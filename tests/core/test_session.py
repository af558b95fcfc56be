"""What adapters are built from: shadows are given back, and an adapter's own faults stay its own."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loops import CNN, batches, sgd
from torch.nn import functional as F

from ampcheck import AmpChecker, FindingsError, Host, Session, contained, shadow, variables
from ampcheck.session import Shadow


class Loop:
    """A host's loop."""

    def __init__(self, fails: BaseException | None = None) -> None:
        self.model = CNN()
        self.optimizer = sgd(self.model)
        self.fails = fails
        self.losses: list[torch.Tensor] = []

    def step(self, batch: Any) -> torch.Tensor:
        """One step."""
        images, labels = batch
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def evaluate(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(batch[0])

    def run(self, count: int = 3) -> str:
        for batch in batches(count, 8):
            self.losses.append(self.step(batch))
        self.evaluate(batch)
        if self.fails is not None:
            raise self.fails
        return "done"

    def find(self, frames: Any) -> Callable[[], object] | None:
        return None


class Adapter:
    """Holds a session as every adapter does."""

    def __init__(self, loop: Loop, session: Session | None = None, **options: Any) -> None:
        self.said: list[str] = []
        self.session = session or Session(warn=self.said.append, report=False, **options)
        self.loop = loop

    @contained
    def begin(self, fault: Exception | None = None) -> str:
        self.session.guard(self.loop, "run", self.failed)
        self.session.watch_training(self.loop, "step", self.loop.find)
        self.session.watch_evaluation(self.loop, "evaluate")
        if fault is not None:
            raise fault
        return "begun"

    @contained
    def attach(self) -> None:
        loop = self.loop
        host = Host("a host", "1", {"AMP401": "Write out of place."})
        self.session.attach(loop.model, optimizers=[loop.optimizer], host=host, emit=self.said.append)

    @contained
    def failed(self, error: BaseException) -> None:
        self.session.diagnose(error, find_batch=self.loop.find)
        self.session.end()

    @contained
    def end(self) -> None:
        self.session.end()

    @property
    def faults(self) -> list[str]:
        return [line for line in self.said if "switched itself off" in line]


def methods(owner: object) -> set[str]:
    return {name for name in ("run", "step", "evaluate", "log") if name in vars(owner)}


class Tape:
    """A method that tells who was called around it."""

    def log(self, *words: str) -> list[str]:
        return [*words]

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def say(word: str, method: Callable[..., list[str]], *words: str) -> list[str]:
    return [word, *method(*words)]


def test_a_shadow_is_called_with_the_method_ahead_of_the_arguments() -> None:
    tape, other = Tape(), Tape()
    placed = shadow(tape, "log", say, "around")
    assert tape.log("a") == ["around", "a"]
    assert other.log("a") == ["a"]
    placed.give_back()
    assert vars(tape) == {}
    placed.give_back()
    assert tape.log("a") == ["a"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_nested_shadows_are_given_back_in_any_order(order: tuple[int, ...]) -> None:
    tape = Tape()
    placed = [shadow(tape, "log", say, word) for word in "abc"]
    assert tape.log() == ["c", "b", "a"]
    for index in order[:-1]:
        placed[index].give_back()
    assert "abc"[order[-1]] in tape.log()
    placed[order[-1]].give_back()
    assert vars(tape) == {}


def test_a_method_of_the_instance_s_own_comes_back() -> None:
    tape = Tape()
    tape.log = own = lambda *words: ["own", *words]  # type: ignore[method-assign]
    placed = shadow(tape, "log", say, "around")
    assert tape.log() == ["around", "own"]
    placed.give_back()
    assert vars(tape) == {"log": own}


def test_what_somebody_else_has_put_there_since_stays() -> None:
    tape = Tape()
    placed = shadow(tape, "log", say, "around")
    theirs = partial(say, "theirs", tape.log)
    tape.log = theirs  # type: ignore[method-assign]
    placed.give_back()
    assert vars(tape) == {"log": theirs}
    assert tape.log("a") == ["theirs", "around", "a"]


def test_what_somebody_else_has_deleted_stays_away() -> None:
    tape = Tape()
    placed = shadow(tape, "log", say, "around")
    del tape.log
    placed.give_back()
    assert vars(tape) == {}


def test_a_shadow_says_what_it_stands_for() -> None:
    loop = Loop()
    placed = shadow(loop, "step", say, "around")
    assert (placed.__name__, placed.__doc__, placed.__self__) == ("step", "One step.", loop)  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.OneCycleLR])
def test_schedulers_take_a_shadowed_step_apart(make: Any) -> None:
    loop = Loop()
    calls: list[str] = []

    def around(method: Callable[..., Any], *args: Any) -> Any:
        calls.append("around")
        return method(*args)

    placed = shadow(loop.optimizer, "step", around)
    options = {"step_size": 1} if make is torch.optim.lr_scheduler.StepLR else {"max_lr": 0.1, "total_steps": 9}
    scheduler = make(loop.optimizer, **options)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    loop.run(1)
    scheduler.step()
    assert calls == ["around"]
    assert not all(map(torch.equal, before, loop.model.parameters()))
    assert placed.__func__.__get__(loop.optimizer, type(loop.optimizer))() is None
    assert calls == ["around"] * 2
    placed.give_back()
    assert "step" not in vars(copy.deepcopy(loop.optimizer))


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_carries_a_shadow_of_its_own(copied: Callable[[Any], Any]) -> None:
    tape = Tape()
    placed = shadow(tape, "log", say, "around")
    other = copied(tape)
    assert isinstance(vars(other)["log"], Shadow)
    assert vars(other)["log"].owner is other
    assert vars(other)["log"].args[-1].__self__ is other
    placed.give_back()
    assert other.log("a") == ["around", "a"]
    vars(other)["log"].give_back()
    assert vars(other) == {}


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_of_a_session_takes_nothing_back(copied: Callable[[Any], Any]) -> None:
    tape, session = Tape(), Session(ignore="AMP107")
    session.shadow(tape, "log", say, "around")
    other = copied(session)
    assert other.checker.options == session.checker.options
    other.end()
    assert tape.log() == ["around"]
    session.end()
    assert vars(tape) == {}


def test_a_run() -> None:
    """The first steps are watched, and nothing is in place after them but the guard, and after the end not that."""
    adapter = Adapter(Loop(), ignore="AMP107,AMP105")
    assert adapter.session.state == "detached"
    assert adapter.begin() == "begun"
    adapter.attach()
    assert adapter.session.state == "attached"
    assert methods(adapter.loop) == {"run", "step", "evaluate"}
    assert adapter.loop.run() == "done"
    assert methods(adapter.loop) == {"run"}
    adapter.session.end()
    assert adapter.session.state == "detached"
    assert methods(adapter.loop) == set()
    report = adapter.session.checker.report
    assert report is not None
    assert report.trace.training is not None
    assert report.trace.evaluation is not None
    assert adapter.faults == []


def test_methods_that_are_not_to_be_watched_any_more_come_back() -> None:
    adapter = Adapter(Loop())
    adapter.begin()
    adapter.session.unwatch()
    assert methods(adapter.loop) == {"run"}
    adapter.session.unwatch()
    adapter.session.end()
    assert methods(adapter.loop) == set()


def test_a_session_s_other_things_are_taken_back_once() -> None:
    class Thing:
        taken = 0

        def give_back(self) -> None:
            self.taken += 1

    first, second = Thing(), Thing()
    session = Session()
    session.put(first)
    session.put(second)
    session.take_back(first, first)
    session.end()
    session.end()
    assert (first.taken, second.taken) == (1, 1)


@pytest.mark.parametrize("error", [None, LookupError("the user's own")])
def test_a_step_between_two_events(error: Exception | None) -> None:
    """One that died is no watched step."""
    adapter = Adapter(Loop(), ignore="AMP107")
    adapter.attach()
    session, checker = adapter.session, adapter.session.checker
    session.open_step(checker.training_step())
    adapter.loop.step(next(iter(batches(1, 8))))
    session.close_step(error)
    session.close_step()
    assert checker.watching is (error is not None)
    session.open_step(checker.evaluation_step())
    session.end()
    assert checker.report is not None
    assert (checker.report.trace.training is None) is (error is not None)
    session.close_step()
    assert adapter.faults == []


def test_the_failure_of_a_guarded_method_is_the_user_s() -> None:
    failure = TypeError("autocast.__init__() got an unexpected keyword argument 'device'")
    adapter = Adapter(Loop(fails=failure))
    adapter.begin()
    adapter.attach()
    with pytest.raises(TypeError) as raised:
        adapter.loop.run()
    assert raised.value is failure
    assert failure.__cause__ is failure.__context__ is None
    assert methods(adapter.loop) == set()
    assert adapter.session.state == "detached"


def test_a_batch_that_cannot_be_found_costs_the_replay_alone() -> None:
    def find(frames: Any) -> None:
        next(iter(frames))
        raise ZeroDivisionError

    adapter = Adapter(Loop())
    adapter.attach()
    with pytest.raises(TypeError) as raised:
        torch.autocast(device="cpu")
    adapter.session.diagnose(raised.value, find_batch=find)
    report = adapter.session.checker.report
    assert report is not None
    assert [finding.code for finding in report.findings if finding.code != "AMP107"] == ["AMP102"]
    assert adapter.faults == []


def test_a_fault_of_an_event_takes_everything_back_and_is_told_once() -> None:
    adapter = Adapter(Loop())
    assert adapter.begin(ZeroDivisionError("ours")) is None
    assert adapter.session.state == "off"
    assert methods(adapter.loop) == set()
    adapter.attach()
    assert adapter.session.state == "off"
    assert adapter.begin(ZeroDivisionError("again")) is None
    assert adapter.loop.run() == "done"
    assert len(adapter.faults) == 1
    assert "ZeroDivisionError: ours" in "\n".join(adapter.said)
    adapter.session.end()
    adapter.attach()
    assert adapter.session.state == "attached", "the next run begins anew"


OPERATIONS = ("shadow", "take_back", "diagnose", "end", "attach")


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_fault_in_any_operation_leaves_the_training_in_front(
    operation: str, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("ours")

    def run(adapter: Adapter | None) -> tuple[Any, ...]:
        torch.manual_seed(0)
        failure = LookupError("the user's own")
        loop = Loop(fails=failure if dies else None)
        if adapter is not None:
            adapter.loop = loop
            adapter.begin()
            adapter.attach()
        with pytest.raises(LookupError) if dies else contextlib.nullcontext() as raised:
            loop.run()
        assert raised is None or raised.value is failure
        if adapter is not None:
            adapter.end()
        assert methods(loop) == set()
        return *map(float, loop.losses), *(parameter.sum().item() for parameter in loop.model.parameters())

    expected = run(None)
    adapter = Adapter(Loop())
    monkeypatch.setattr(Session, operation, fault)
    assert run(adapter) == expected
    assert len(adapter.faults) == (operation != "diagnose" or dies)


def test_a_fault_of_what_is_shown_a_failure_does_not_replace_it() -> None:
    loop, session = Loop(fails=LookupError("the user's own")), Session(report=False)

    def failed(error: BaseException) -> None:
        raise ZeroDivisionError("ours")

    session.guard(loop, "run", failed)
    with pytest.raises(LookupError, match="the user's own"):
        loop.run()
    assert session.state == "off"
    assert methods(loop) == set()


def test_a_thing_that_cannot_be_taken_back_keeps_no_other_in_place() -> None:
    class Stuck:
        def give_back(self) -> None:
            raise ZeroDivisionError("stuck")

    adapter = Adapter(Loop())
    adapter.session.put(Stuck())
    adapter.begin()
    adapter.session.put(Stuck())
    adapter.end()
    assert methods(adapter.loop) == set()
    assert len(adapter.faults) == 1


def test_a_finding_that_was_asked_for_comes_through() -> None:
    adapter = Adapter(Loop(), fail_on="error", select="AMP201")
    adapter.loop.model.half()
    adapter.begin()
    adapter.session.attach = partial(adapter.session.attach, scaler=torch.amp.GradScaler("cpu"))  # type: ignore[method-assign]
    with pytest.raises(FindingsError, match="AMP201"):
        adapter.attach()
    assert adapter.session.state == "attached"
    adapter.session.end()
    assert methods(adapter.loop) == set()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_error_comes_through(interrupt: type[BaseException]) -> None:
    @contained
    def event(adapter: Adapter) -> None:
        raise interrupt

    adapter = Adapter(Loop())
    with pytest.raises(interrupt):
        event(adapter)
    assert adapter.session.state == "detached"


def test_options_or_a_checker() -> None:
    checker = AmpChecker(ignore="AMP107")
    assert Session(checker, select=(), fail_on="never").checker is checker
    assert Session(ignore="AMP1", watch_steps=2).checker.options["watch_steps"] == 2
    with pytest.raises(ValueError, match="takes ignore, report or a checker, not both: either `checker` or options"):
        Session(checker, ignore="AMP1", report=False)
    with pytest.raises(ValueError, match="AMP777"):
        Session(select="AMP777")
    with pytest.raises(TypeError, match="verbose"):
        Session(verbose=True)


def test_variables_of_frames() -> None:
    def outer(batch: int) -> Any:
        loss = 2
        return inner(batch + loss)

    def inner(batch: int) -> Any:
        import sys
        from traceback import walk_stack

        return list(variables((frame for frame, _ in walk_stack(sys._getframe())), "batch", **asked))

    asked: dict[str, Any] = {}
    assert [held["batch"] for held in outer(1)] == [3, 1]
    asked = {"function": "outer"}
    assert [(held["batch"], held["loss"]) for held in outer(1)] == [(1, 2)]
    asked = {"function": "nobody"}
    assert outer(1) == []
