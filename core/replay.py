"""Run a failing step again under probes, and put everything back."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import re
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ampcheck.autograd import leaves_behind, tensors_in
from ampcheck.probes.containment import undo
from ampcheck.walk import is_sharded

T = TypeVar("T")

Step = Callable[[], Any]

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)
_MORE_DRAWS = 4
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Replay(Generic[T]):
    """How a replay went: what was seen (``None``: there was no replay, or memory ran out), whether it failed in the
    same way, and both in words."""

    seen: T | None
    failed_again: bool
    said: str


def replay(
    step: Step,
    examine: Callable[[BaseException | None], T],
    *,
    model: nn.Module,
    error: BaseException,
    probes: Callable[[], AbstractContextManager[Any]],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    scaler: torch.amp.GradScaler | None = None,
) -> Replay[T]:
    """Run ``step`` again under ``probes`` and return what ``examine`` makes of it, given what the replay raised.

    ``step`` computes the loss of the failing batch the way its host does, on the unwrapped module, and returns it:
    a tensor, or tensors in lists, tuples and dicts, of which those with a graph are differentiated. It runs no
    backward pass itself, but where the host leaves that to the user. A step that draws random numbers and does not
    fail again is given others, a few times. Afterwards these are as before, bit for bit:
    parameters, buffers, gradients (the same tensors), optimizers, scaler, random states, training and
    ``requires_grad`` flags, hooks, and what modules hold as plain attributes. No collective is called.

    Never raises, but for what is no error of the program (``KeyboardInterrupt``).
    """
    reason = _why_not(model, error)
    if reason:
        return Replay(None, False, f"the failing batch was not replayed: {reason}")
    try:
        run = functools.partial(_run, step, examine, model, probes, list(optimizers), scaler)
        raised, seen, drew = run(None)
        for seed in range(_MORE_DRAWS if drew and not _alike(raised, error) else 0):
            again, seen_again, _ = run(seed)
            if _alike(again, error):
                raised, seen = again, seen_again
                break
    except (MemoryError, torch.OutOfMemoryError):
        return Replay(None, False, "a replay of the failing batch ran out of memory")
    except Exception as fault:  # noqa: BLE001 - the user's exception stays in front
        return Replay(None, False, f"the failing batch could not be replayed: {_line(fault)}")
    if raised is None:
        return Replay(seen, False, "a replay of the failing batch did not fail")
    if _alike(raised, error):
        return Replay(seen, True, "a replay of the failing batch failed in the same way")
    return Replay(seen, False, f"a replay of the failing batch failed otherwise: {_line(raised)}")


def _run(
    step: Step,
    examine: Callable[[BaseException | None], T],
    model: nn.Module,
    probes: Callable[[], AbstractContextManager[Any]],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None,
    seed: int | None,
) -> tuple[Exception | None, T, bool]:
    """What the step raised, what was seen of it, and whether it drew random numbers."""
    with ExitStack() as stack:
        stack.enter_context(_everything_put_back(model, optimizers, scaler))
        stack.enter_context(_one_process())
        stack.enter_context(_eager())
        stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(_own_autocast_cache())
        if seed is not None:
            _draw_from(seed)
        before = _random_state()
        raised: Exception | None = None
        with torch.enable_grad():
            try:
                with probes():
                    _differentiate(step())
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - to see it is what a replay is for
                raised = error
            # The graph lives in the frames of what was raised: read it now.
            seen = examine(raised)
        return raised, seen, not _same_random_state(before, _random_state())


def _differentiate(result: Any) -> None:
    """What backward would do, but that gradients go nowhere: hooks that wait for them (a reducer's) are not called."""
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
    """``loss.backward(...)`` for a step that is replayed and runs backward itself: without the hooks on parameters,
    which are where processes wait for one another. Gradients of ``module``'s parameters, or of ``inputs``, are new
    tensors; the replay puts the old ones back."""
    own = [parameter for parameter in module.parameters() if parameter.requires_grad]
    leaves = own if inputs is None else [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    gradients = torch.autograd.grad(loss, leaves or [loss], gradient, retain_graph, create_graph, allow_unused=True)
    for leaf, found in zip(leaves, gradients, strict=False):
        if found is not None:
            leaf.grad = found if leaf.grad is None else leaf.grad + found


def _why_not(model: nn.Module, error: BaseException) -> str | None:
    if not isinstance(error, Exception):
        return f"{type(error).__name__} is no failure"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory ran out"
    if any(is_traceable_wrapper_subclass(parameter.data) for parameter in model.parameters()):
        return "its parameters are distributed tensors, which only all processes together can compute with"
    if is_sharded(model):
        return "the model is sharded"
    return None


def _alike(one: BaseException | None, other: BaseException) -> bool:
    """The same failure: versions and addresses in the text may differ."""
    return type(one) is type(other) and _NUMBERS.sub("#", str(one)) == _NUMBERS.sub("#", str(other))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Kept:
    """A tensor and its bytes. A tensor that was not written to is not written to again."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.data
        self._content = tensor.detach().clone()
        self._requires_grad = tensor.requires_grad
        self._grad = tensor.grad if tensor.is_leaf else None
        self._grad_content = None if self._grad is None else self._grad.detach().clone()

    def put_back(self) -> None:
        tensor = self._tensor
        if tensor.data_ptr() != self._data.data_ptr() or tensor.shape != self._data.shape:
            tensor.data = self._data
        _write_back(self._data, self._content)
        if tensor.is_leaf:
            if tensor.requires_grad is not self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self._grad:
                tensor.grad = self._grad
        if self._grad is not None and self._grad_content is not None:
            _write_back(self._grad.detach(), self._grad_content)


class _KeptAttributes:
    """The attributes of an object, and the contents of those that are plain containers."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._values = dict(attributes)
        self._contents = [
            (value, copy.copy(value)) for value in attributes.values() if type(value) in _CONTAINERS and value
        ]
        self._empty = [value for value in attributes.values() if type(value) in _CONTAINERS and not value]

    def put_back(self) -> None:
        if self._attributes.keys() != self._values.keys() or any(
            self._attributes[name] is not value for name, value in self._values.items()
        ):
            self._attributes.clear()
            self._attributes.update(self._values)
        for value in self._empty:
            value.clear()
        for value, content in self._contents:
            if len(value) != len(content) or any(
                a is not b for a, b in zip(_items(value), _items(content), strict=True)
            ):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(content)


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for item in container.items():
            yield from item
    else:
        yield from container


@contextlib.contextmanager
def _everything_put_back(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None
) -> Iterator[None]:
    owners: list[dict[str, Any]] = [module.__dict__ for module in model.modules()]
    owners += [optimizer.__dict__ for optimizer in optimizers]
    owners += [group for optimizer in optimizers for group in optimizer.param_groups]
    owners += [state for optimizer in optimizers for state in optimizer.state.values()]
    if scaler is not None:
        owners.append(scaler.__dict__)
        owners += list(getattr(scaler, "_per_optimizer_states", {}).values())
    kept: list[_Kept | _KeptAttributes] = [_KeptAttributes(owner) for owner in owners]
    tensors: dict[int, torch.Tensor] = {}
    for owner in owners:
        values = [v for v in owner.values() if isinstance(v, torch.Tensor)]
        values += [v for name in ("_parameters", "_buffers") for v in owner.get(name, {}).values() if v is not None]
        tensors.update((id(value), value) for value in values)
    kept += [_Kept(tensor) for tensor in tensors.values()]
    kept_random = _random_state()
    try:
        yield
    finally:
        # What one of them raises keeps no other from being put back.
        with torch.no_grad(), ExitStack() as rest:
            rest.callback(undo, _set_random_state, kept_random)
            for one in reversed(kept):
                rest.callback(undo, one.put_back)


@torch.no_grad()
def _write_back(tensor: torch.Tensor, content: torch.Tensor) -> None:
    if not _same_bytes(tensor, content):
        tensor.copy_(content)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is not torch.strided or one.is_quantized:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all()) and not _signs_differ(one, other)


def _signs_differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Equal numbers of other bytes: zeros of either sign.
    return one.is_floating_point() and bool((torch.signbit(one) != torch.signbit(other)).any())


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Let code that asks see no process group, so that it calls no collective."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    from torch.distributed import distributed_c10d

    owners: list[Any] = [distributed, distributed_c10d]
    originals = [owner.is_initialized for owner in owners]
    try:
        for owner in owners:
            owner.is_initialized = _not_initialized
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.is_initialized = original


def _not_initialized() -> bool:
    return False


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


def _random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def _set_random_state(state: tuple[Any, ...]) -> None:
    of_torch, of_cuda, of_python, of_numpy = state
    torch.set_rng_state(of_torch)
    if of_cuda is not None:
        torch.cuda.set_rng_state_all(of_cuda)
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


def _same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same = torch.equal(one[0], other[0]) and all(map(torch.equal, one[1] or (), other[1] or ()))
    of_numpy = one[3] is None or (one[3][2] == other[3][2] and bool((one[3][1] == other[3][1]).all()))
    return same and one[2] == other[2] and of_numpy


def _draw_from(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
