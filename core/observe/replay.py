"""Run a failing step again under probes, and put everything back."""

from __future__ import annotations

import contextlib
import functools
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ampcheck.observe.autograd import leaves_behind
from ampcheck.observe.probes.listening import nobody_listening
from ampcheck.observe.probes.modules import on_module_calls
from ampcheck.observe.state import draw_from, everything_put_back, random_state, same_random_state, set_random_state
from ampcheck.observe.tensors import tensors_in
from ampcheck.observe.walk import is_sharded

T = TypeVar("T")

Step = Callable[[], Any]
Random = int | tuple[Any, ...]
"""What random numbers are drawn from: a seed, or a state."""

_MORE_DRAWS = 4
_MOST_SECONDS = 60
_replaying: list[None] = []


class _TooLong(BaseException):
    """A replay took longer than anybody waits for a message.

    A ``BaseException``, so that no handler in the program takes it for an error.
    """


def _not_after(deadline: float) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if time.monotonic() > deadline:
            raise _TooLong

    return before


_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Replay(Generic[T]):
    """How a replay went.

    ``seen`` is what ``examine`` returned (``None``: there was no replay, or it ran out of memory or time),
    ``went_alike`` whether it failed in the same way or, if nothing had failed, ran, and ``said`` both in words.
    ``seed`` is what the random numbers with which it failed were drawn from (``None``: those of the program). ``ran``:
    whether there was a replay.
    """

    seen: T | None
    went_alike: bool
    said: str
    seed: Random | None = None
    ran: bool = True


def replay(
    step: Step,
    examine: Callable[[BaseException | None], T],
    *,
    model: nn.Module,
    error: BaseException | None,
    probes: Callable[[], AbstractContextManager[Any]],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    scaler: torch.amp.GradScaler | None = None,
    seed: Random | None = None,
    again: Callable[[BaseException | None, T], bool] | None = None,
) -> Replay[T]:
    """Run ``step`` again under ``probes`` and return what ``examine`` makes of it, given what the replay raised.

    ``error`` is what the step failed with, ``None`` if it did not fail. ``step`` computes the loss of the failing batch
    the way its host does, on the unwrapped module, and returns it: a tensor, or tensors in lists, tuples and dicts;
    those with a graph are differentiated. It runs no backward pass itself, unless the host leaves that to the user. A
    step that draws random numbers and does not fail again is repeated a few times with others, drawn from a seed that
    is returned; ``seed`` is that of an earlier replay. ``again`` says whether a replay failed again, for a failure that
    is no exception.

    Afterwards these are as before, bit for bit: parameters, buffers, gradients (the same tensors), optimizers, scaler,
    random states, training and ``requires_grad`` flags, hooks, and plain attributes of modules. No collective is
    called.

    Raises only faults of its own.
    """
    reason = _why_not(model, error)
    if _replaying:
        reason = "a replay is already running"
    if reason:
        return Replay(None, False, f"the failing batch was not replayed: {reason}", ran=False)
    # The step may raise the same object, which belongs to the user.
    names = ("__traceback__", "__cause__", "__context__", "__suppress_context__")
    own = [(name, getattr(error, name)) for name in names] if error is not None else []
    alike = again or (lambda raised, _: _alike(raised, error))
    try:
        run = functools.partial(_run, step, examine, model, probes, list(optimizers), scaler)
        raised, seen, drew = run(seed)
        failed = error is not None or again is not None
        for other in range(_MORE_DRAWS if drew and failed and not alike(raised, seen) else 0):
            raised_again, seen_again, _ = run(other)
            if alike(raised_again, seen_again):
                raised, seen, seed = raised_again, seen_again, other
                break
    except (MemoryError, torch.OutOfMemoryError):
        return Replay(None, False, "a replay of the failing batch ran out of memory", ran=False)
    except _TooLong:
        return Replay(None, False, f"a replay of the failing batch took more than {_MOST_SECONDS} seconds", ran=False)
    finally:
        # Setting the cause suppresses the context, so that flag comes last.
        for name, value in own:
            setattr(error, name, value)
    if again is not None:
        went = again(raised, seen)
        said = "a replay of the batch is not finite either" if went else "a replay of the batch is finite"
        return Replay(seen, went, said + (f", and failed: {_line(raised)}" if raised else ""), seed)
    if error is None:
        return Replay(seen, raised is None, "a replay of the batch" + (f" failed: {_line(raised)}" if raised else ""))
    if raised is None:
        return Replay(seen, False, "a replay of the failing batch did not fail")
    if _alike(raised, error):
        return Replay(seen, True, "a replay of the failing batch failed in the same way", seed)
    return Replay(seen, False, f"a replay of the failing batch failed differently: {_line(raised)}")


def _run(
    step: Step,
    examine: Callable[[BaseException | None], T],
    model: nn.Module,
    probes: Callable[[], AbstractContextManager[Any]],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None,
    seed: Random | None,
) -> tuple[BaseException | None, T, bool]:
    """Return what the step raised, what was seen of it, and whether it drew random numbers."""
    with ExitStack() as stack:
        stack.enter_context(everything_put_back(model, optimizers, scaler, (step, *getattr(step, "roots", ()))))
        _replaying.append(None)
        stack.callback(_replaying.pop)
        stack.enter_context(nobody_listening())
        stack.callback(on_module_calls(_not_after(time.monotonic() + _MOST_SECONDS)))
        stack.enter_context(_one_process())
        stack.enter_context(_eager())
        stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(_own_autocast_cache())
        if isinstance(seed, int):
            draw_from(seed)
        elif seed is not None:
            set_random_state(seed)
        before = random_state()
        raised: BaseException | None = None
        watched = probes()
        with torch.enable_grad():
            try:
                with watched:
                    _differentiate(step())
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - seeing it is what a replay is for
                raised = error
            # A thread that the step started may have caught it.
            raised = raised or getattr(watched, "failure", None)
            try:
                # The graph lives in the frames of the exception: read it now.
                seen = examine(raised)
            finally:
                if raised is not None:
                    # Those frames hold the model.
                    raised.__traceback__ = raised.__cause__ = raised.__context__ = None
        return raised, seen, not same_random_state(before, random_state())


def _differentiate(result: Any) -> None:
    """Do what backward would, but keep no gradients: hooks that wait for them (a reducer's) are not called."""
    losses = [loss for loss in tensors_in(result) if loss.grad_fn is not None]
    if not losses:
        losses = [loss for loss in tensors_in(result) if loss.is_floating_point()][:1]
    if losses:
        leaves = list(leaves_behind(losses))
        torch.autograd.grad(losses, leaves or losses, [torch.ones_like(loss) for loss in losses], allow_unused=True)


def backward_without_hooks(
    module: nn.Module,
    loss: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Run ``loss.backward(...)`` without the hooks on parameters, in a replayed step that runs backward itself.

    In those hooks processes wait for one another. Gradients of ``module``'s parameters, or of ``inputs``, are new
    tensors; the replay puts the old ones back.
    """
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    leaves: Sequence[torch.Tensor] = own
    if inputs is not None:
        leaves = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    _accumulate(leaves or [loss], loss, gradient, retain_graph, create_graph)


def _why_not(model: nn.Module, error: BaseException | None) -> str | None:
    if error is not None and not isinstance(error, Exception):
        return f"{type(error).__name__} is not a failure"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory ran out"
    if any(is_traceable_wrapper_subclass(parameter.data) for parameter in model.parameters()):
        return "its parameters are distributed tensors, and computing with them takes all processes"
    if is_sharded(model):
        return "the model is sharded"
    return None


def _alike(one: BaseException | None, other: BaseException | None) -> bool:
    """Whether two failures are the same; versions and addresses in the text may differ."""
    return type(one) is type(other) and _NUMBERS.sub("#", str(one)) == _NUMBERS.sub("#", str(other))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Hide the process group from code that asks for it, so that it calls no collective."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    from torch.distributed import distributed_c10d

    wrapper, autograd = nn.parallel.DistributedDataParallel, torch.autograd
    stand_ins: list[tuple[Any, str, Any]] = [
        (distributed, "is_initialized", _not_initialized),
        (distributed_c10d, "is_initialized", _not_initialized),
        (wrapper, "forward", lambda self, *args, **kwargs: self.module(*args, **kwargs)),
        (autograd, "backward", _backward_of_one),
    ]
    originals = [vars(owner)[name] for owner, name, _ in stand_ins]
    try:
        for owner, name, stand_in in stand_ins:
            setattr(owner, name, stand_in)
        yield
    finally:
        for (owner, name, _), original in zip(stand_ins, originals, strict=True):
            setattr(owner, name, original)


def _not_initialized() -> bool:
    return False


def _backward_of_one(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """Run ``torch.autograd.backward`` without the hooks on parameters, in which processes wait for one another."""
    leaves = list(tensors_in(inputs)) or [leaf for leaf in leaves_behind(tensors) if leaf.requires_grad]
    roots = list(tensors_in(tensors if isinstance(tensors, torch.Tensor) else list(tensors)))
    _accumulate(leaves or roots, roots, grad_tensors, retain_graph, create_graph)


def _accumulate(leaves: Sequence[torch.Tensor], roots: Any, gradient: Any, retain: bool | None, create: bool) -> None:
    gradients = torch.autograd.grad(roots, leaves, gradient, retain, create, allow_unused=True)
    for leaf, found in zip(leaves, gradients, strict=True):
        if found is not None and leaf.is_leaf:
            leaf.grad = found if leaf.grad is None else leaf.grad + found


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None:
        yield
        return
    with set_stance("force_eager"):
        yield


@contextlib.contextmanager
def _own_autocast_cache() -> Iterator[None]:
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
