"""``Session``, which every adapter holds: it shadows the host's methods, gives them back, and keeps the adapter's own
errors out of the training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from traceback import walk_tb
from types import FrameType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from torch import nn

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.export.followed import FollowedExports
from ampcheck.report.teller import Emit
from ampcheck.run import FindBatch

P = ParamSpec("P")
R = TypeVar("R")


class Shadow(functools.partial[Any]):
    """Replaces a method of one instance. It is not a closure: a copy of the instance gets its own shadow, and the
    instance can be pickled if ``around`` can."""

    owner: Any
    name: str
    before: dict[str, Any]
    given_back = False

    @property
    def __self__(self) -> Any:
        return self.owner

    @property
    def __func__(self) -> Callable[..., Any]:
        # Learning rate schedulers take the function out of an optimizer's `step` and bind it again.
        return functools.wraps(self, updated=())(lambda owner, /, *args, **kwargs: self(*args, **kwargs))

    def give_back(self) -> None:
        """Put back what was there before, unless somebody else has replaced the method since.

        Shadows of one method may be given back in any order, and more than once.
        """
        self.given_back = True
        attributes = vars(self.owner)
        while isinstance(top := attributes.get(self.name), Shadow) and top.given_back:
            del attributes[self.name]
            attributes.update(top.before)


def shadow(owner: Any, name: str, around: Callable[..., Any], *first: Any) -> Shadow:
    """Call ``around(*first, method, ...)`` instead of the method ``name`` of this one instance."""
    method = getattr(owner, name)
    placed = Shadow(around, *first, method)
    functools.update_wrapper(placed, method)
    placed.owner, placed.name, placed.given_back = owner, name, False
    placed.before = {name: vars(owner)[name]} if name in vars(owner) else {}
    vars(owner)[name] = placed
    return placed


def variables(frames: Iterable[FrameType], *names: str, function: str | None = None) -> Iterator[dict[str, Any]]:
    """The variables of each frame that has all of these ``names``, or only of the frames of ``function``."""
    for frame in frames:
        if function is None or frame.f_code.co_name == function:
            held = frame.f_locals
            if all(name in held for name in names):
                yield dict(held)


class Returnable(Protocol):
    """Something that a session takes back."""

    def give_back(self) -> None: ...


class Session:
    """A host's runs, one after the other: a checker, and what the adapter has put into the host's objects.

    ``state`` is ``"detached"`` before a model is attached and after the end, ``"attached"`` in between, and ``"off"``
    from an error of the adapter to the end of that run. ``checker.watching`` and ``checker.watching_evaluation`` tell
    whether steps are left to watch.

    ``options`` are those of ``AmpChecker``; ``checker`` is an existing one and replaces them. ``warn`` gets the warning
    that the adapter has failed (default: standard error). Raises ``ValueError`` if both are passed, and whatever
    ``AmpChecker`` raises.
    """

    def __init__(self, checker: AmpChecker | None = None, *, warn: Emit | None = None, **options: Any) -> None:
        defaults = AmpChecker.__init__.__kwdefaults__ or {}
        given = [name for name, value in options.items() if value != defaults.get(name)]
        if checker is not None and given:
            either = "either `checker` or options for one"
            raise ValueError(f"AmpCheck takes {', '.join(given)} or a checker, not both: {either}")
        self.checker = AmpChecker(**options) if checker is None else checker
        self.warn = warn
        self.state: Literal["detached", "attached", "off"] = "detached"
        self._put: list[Returnable] = []
        self._step: AbstractContextManager[object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was put into the host: a copy, or one in another process, has put nothing anywhere."""
        return vars(self) | {"_put": [], "_step": None}

    def attach(self, model: nn.Module, **seen: Any) -> None:
        """``AmpChecker.attach``, unless the adapter has failed in this run."""
        if self.state != "off":
            self.state = "attached"
            if self.checker.follows_exports and not any(isinstance(one, FollowedExports) for one in self._put):
                self.put(exports := FollowedExports(self.checker, self.fail))
                exports.begin()
            self.checker.attach(model, **seen)

    def look(self, moment: str, *, steps: int | None = None, loss: float | None = None) -> None:
        """``AmpChecker.look``, while a model is attached."""
        if self.state == "attached":
            self.checker.look(moment, steps=steps, loss=loss)

    def put(self, thing: Returnable) -> None:
        """Call ``thing.give_back()`` at the end of the run, or after an error of the adapter."""
        self._put.append(thing)

    def shadow(self, owner: Any, name: str, around: Callable[..., Any], *first: Any) -> Shadow:
        """Call ``around(*first, method, ...)`` instead of the method ``name`` of this one instance, until the end of
        the run."""
        placed = shadow(owner, name, around, *first)
        self._put.append(placed)
        return placed

    def guard(self, owner: Any, name: str, failed: Callable[[BaseException], None]) -> None:
        """Pass every exception that leaves this method of one instance to ``failed``."""
        self.shadow(owner, name, self._guarded, failed)

    def watch_training(self, owner: Any, name: str, batch: FindBatch) -> None:
        """Watch each call of this method of one instance as a training step, as long as one is left to watch."""
        self.shadow(owner, name, self._training_step, batch)

    def watch_evaluation(self, owner: Any, name: str) -> None:
        """Watch each call of this method of one instance as an evaluation step, as long as one is left to watch."""
        self.shadow(owner, name, self._evaluation_step)

    def unwatch(self) -> None:
        """Give back the methods whose calls are watched as steps."""
        self._unwatch(self._training_step, self._evaluation_step)

    def open_step(self, step: AbstractContextManager[object]) -> None:
        """Enter a step of the checker that ends with another event of the host."""
        self._step = step
        step.__enter__()

    def close_step(self, error: BaseException | None = None) -> None:
        """Leave the open step, if there is one; ``error`` is the exception that ended it."""
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def take_back(self, *things: Returnable) -> None:
        """Take these things back before the end."""
        for thing in things:
            if thing in self._put:
                thing.give_back()
                self._put.remove(thing)

    def diagnose(
        self,
        error: BaseException,
        *,
        phase: str = "training_step",
        step: int | None = None,
        find_batch: FindBatch | None = None,
    ) -> None:
        """``AmpChecker.diagnose``, with the failing batch that ``find_batch`` finds in the frames of ``error``. Never
        raises."""
        try:
            batch = None
            if find_batch is not None:
                # Without the batch, the frames still tell something.
                with suppress(Exception):
                    batch = find_batch(frame for frame, _ in walk_tb(error.__traceback__))
            self.checker.diagnose(error, phase=phase, step=step, batch=batch)
        except Exception as fault:  # noqa: BLE001 - the user's exception stays in front
            self.fail(fault)

    def end(self) -> None:
        """End the run: take everything back, and detach. May be called again, and before the next run."""
        self.take_back(*reversed(self._put))
        self._step = None
        self.checker.detach()
        self.state = "detached"

    def fail(self, error: Exception) -> None:
        """After an error of the adapter: take everything back, warn once, and leave the run alone. Never raises."""
        self.state = "off"
        for thing in reversed(self._put):
            with suppress(Exception):
                thing.give_back()
        self._put.clear()
        self._step = None
        self.checker.switch_off(error, emit=self.warn)
        self.checker.detach()

    def _guarded(
        self, failed: Callable[[BaseException], None], method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            try:
                failed(error)
            except Exception as fault:  # noqa: BLE001 - the training's exception stays in front
                self.fail(fault)
            raise

    def _training_step(self, batch: FindBatch, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.checker.training_step(batch=batch):
            output = method(*args, **kwargs)
        if not self.checker.watching:
            self._unwatch(self._training_step)
        return output

    def _evaluation_step(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.checker.evaluation_step():
            output = method(*args, **kwargs)
        if not self.checker.watching_evaluation:
            self._unwatch(self._evaluation_step)
        return output

    def _unwatch(self, *steps: Callable[..., Any]) -> None:
        try:
            self.take_back(*(one for one in reversed(self._put) if isinstance(one, Shadow) and one.func in steps))
        except Exception as error:  # noqa: BLE001 - the training's step has succeeded
            self.fail(error)


class HasSession(Protocol):
    """An adapter."""

    session: Session


A = TypeVar("A", bound=HasSession)


def contained(event: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R | None]:
    """Decorate a method of an adapter so that it raises nothing into the training but the ``FindingsError`` that the
    user asked for: any other exception is the adapter's own error."""

    @functools.wraps(event)
    def call(self: A, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return event(self, *args, **kwargs)
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - it is AmpCheck's error, not the user's
            self.session.fail(error)
            return None

    return call
