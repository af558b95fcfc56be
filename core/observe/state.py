"""Keep what a repeated step may change, and put it back."""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ampcheck.observe.probes.containment import undo
from ampcheck.observe.tensors import same_values
from ampcheck.source.lines import is_library

_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque, Counter, bytearray)
_RECORDS = (types.SimpleNamespace, argparse.Namespace)
_ATOMS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
# Beyond these a program holds data rather than state.
_MOST_OBJECTS, _LONGEST, _MOST_BYTES = 200_000, 10_000, 2**28


@contextlib.contextmanager
def everything_put_back(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler | None,
    roots: Iterable[Any] = (),
) -> Iterator[None]:
    """Put everything that the block may change back as it was, bit for bit.

    That is: parameters, buffers and gradients (the same tensors), optimizers, scaler, random states, flags and hooks of
    modules; and, up to some 200,000 objects and 256 MB of data, what the user's own code can reach from the model and
    from ``roots``: attributes of objects and classes, globals, containers, arrays, random generators. Meanwhile copies
    stand in for iterators.
    """
    kept = _Kept()
    kept_random = random_state()
    with ExitStack() as rest:
        # If one of them raises, the others still run.
        rest.callback(undo, set_random_state, kept_random)
        rest.callback(kept.put_back)
        kept.take(model, optimizers, scaler, roots)
        yield


class _Kept:
    """What was kept, as functions that put it back; the last runs first."""

    def __init__(self) -> None:
        self.puts_back: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        self._pending: list[Any] = []
        self._bytes = 0

    def take(self, model: nn.Module, optimizers: Iterable[Any], scaler: Any, roots: Iterable[Any]) -> None:
        for module in model.modules():
            self.module(module)
        for optimizer in optimizers:
            self.reach(optimizer)
        self.reach(scaler)
        for root in roots:
            self.reach(root)
        self.follow()

    def put_back(self) -> None:
        first: BaseException | None = None
        with torch.no_grad():
            while self.puts_back:
                try:
                    undo(self.puts_back.pop())
                except BaseException as error:  # noqa: BLE001 - raised at the end
                    first = first or error
        if first is not None:
            raise first

    def module(self, module: nn.Module) -> None:
        """Keep a module of the model that trains."""
        if self._is_new(module):
            self._module(module)

    def _module(self, module: nn.Module) -> None:
        self.attributes(module.__dict__)
        for owned in (module._parameters, module._buffers):
            self.attributes(owned)
        self._pending.append(type(module))

    def attributes(self, attributes: dict[str, Any]) -> None:
        """Keep the attributes of an object, and the tensors among them in full, whatever their size."""
        if not self._is_new(attributes):
            return
        self.puts_back.append(_Contents(attributes).put_back)
        for value in tuple(attributes.values()):
            if isinstance(value, torch.Tensor):
                self._tensor(value)
            else:
                self.reach(value)

    def reach(self, value: Any) -> None:
        """Mark something that the step may change, with everything reachable from it, to be kept."""
        if type(value) not in _ATOMS:
            self._pending.append(value)

    def follow(self) -> None:
        while self._pending and len(self._seen) < _MOST_OBJECTS:
            value = self._pending.pop()
            if self._is_new(value):
                try:
                    self._one(value)
                except (MemoryError, torch.OutOfMemoryError):
                    # What is not kept could not be put back.
                    raise
                except Exception:  # noqa: BLE001, S110 - leave an object alone that cannot be inspected
                    pass

    def _is_new(self, value: Any) -> bool:
        if id(value) in self._seen:
            return False
        # Held, so that its id is not reused.
        self._seen[id(value)] = value
        return True

    def _one(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            # Data beyond the budget is left alone: nobody trains it, and copying it may take all memory.
            if kind in (torch.Tensor, nn.Parameter) and (value.requires_grad or self._affords(value)):
                self._keep(value)
        elif isinstance(value, (torch.optim.Optimizer, torch.amp.GradScaler)):
            self.attributes(value.__dict__)
            for state in _states_of(value):
                self.attributes(state)
        elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
            self._object(value)
        elif kind in _CONTAINERS or isinstance(value, (tuple, frozenset)):
            self._container(value)
        elif isinstance(value, torch.Generator):
            self.puts_back.append(_call(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.puts_back.append(_call(value.setstate, value.getstate()))
        elif _is_numpy(kind, "ndarray"):
            self._array(value)
        elif _is_numpy(kind, "Generator", "RandomState"):
            bits = getattr(value, "bit_generator", None) or value._bit_generator
            self.puts_back.append(_call(setattr, bits, "state", copy.deepcopy(bits.state)))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._pending += [value.__func__, value.__self__]
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, nn.Module):
            self._module(value)
            for part in value.modules():
                self.module(part)
        elif kind in _RECORDS or not is_of_library(kind):
            self._object(value)

    def _affords(self, value: Any) -> bool:
        size = value.nbytes if hasattr(value, "nbytes") else value.numel() * value.element_size()
        if self._bytes + size > _MOST_BYTES:
            return False
        self._bytes += size
        return True

    def _tensor(self, tensor: torch.Tensor) -> None:
        if self._is_new(tensor):
            self._keep(tensor)

    def _keep(self, tensor: torch.Tensor) -> None:
        self.puts_back.append(_Tensor(tensor).put_back)
        if tensor.is_leaf and tensor.grad is not None:
            self._tensor(tensor.grad)

    def _container(self, value: Any) -> None:
        if type(value) in _CONTAINERS:
            self.puts_back.append(_Contents(value).put_back)
        if isinstance(value, bytearray) or len(value) > _LONGEST:
            return
        for item in tuple(value.values() if isinstance(value, dict) else value):
            self.reach(item)

    def _array(self, array: Any) -> None:
        if array.flags.writeable and self._affords(array):
            content = array.copy()

            def put_back() -> None:
                array[...] = content

            self.puts_back.append(put_back)

    def _function(self, function: types.FunctionType) -> None:
        if is_library(function.__code__.co_filename):
            return
        self.reach(getattr(function, "__wrapped__", None))
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):
                self.reach(cell.cell_contents)
        self._globals(function.__code__, function.__globals__)

    def _globals(self, code: types.CodeType, names: dict[str, Any]) -> None:
        """Keep the globals that code reads or writes, by name."""
        for name in code.co_names:
            if name in names:
                self.puts_back.append(_call(names.__setitem__, name, names[name]))
                self.reach(names[name])
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self._globals(inner, names)

    def _class(self, kind: type) -> None:
        if is_of_library(kind):
            return
        for name, value in tuple(vars(kind).items()):
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                self.reach(function)
            elif not (name.startswith("__") and name.endswith("__")) and not hasattr(value, "__get__"):
                self.puts_back.append(_call(_put_back_attribute, kind, name, value))
                self.reach(value)
        self._pending += kind.__bases__

    def _object(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.puts_back.append(_Contents(attributes).put_back)
            for item in tuple(attributes.values()):
                self.reach(item)
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name) and name not in ("__dict__", "__weakref__"):
                    self.puts_back.append(_call(_put_back_attribute, value, name, getattr(value, name)))
                    self.reach(getattr(value, name))
        self._pending.append(type(value))


def _states_of(value: torch.optim.Optimizer | torch.amp.GradScaler) -> Iterable[dict[str, Any]]:
    """The dicts in which an optimizer or a scaler keeps its tensors."""
    if isinstance(value, torch.optim.Optimizer):
        return (*value.param_groups, *value.state.values())
    return getattr(value, "_per_optimizer_states", {}).values()


def _put_back_attribute(owner: Any, name: str, value: Any) -> None:
    # An enumeration, or a read-only object, refuses to be given even what it has.
    held = vars(owner).get(name) if isinstance(owner, type) else getattr(owner, name, None)
    if held is not value:
        setattr(owner, name, value)


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], None]:
    return lambda: function(*args)


def is_of_library(kind: type) -> bool:
    """Whether a class is not part of the user's own code."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if kind.__module__ == "builtins" or module is None:
        return True
    return file is not None and is_library(file)


def _is_numpy(kind: type, *names: str) -> bool:
    return kind.__module__.partition(".")[0] == "numpy" and kind.__name__ in names


class _Contents:
    """A container, or the attributes of an object, whose items are put back as the same objects.

    Meanwhile a copy hides each iterator among them, and the step draws from the copy.
    """

    def __init__(self, container: Any) -> None:
        self._container = container
        # Much faster than `copy.copy` for an ordered dictionary, of which every module has a dozen.
        self._items = container.copy()
        if isinstance(container, (dict, list)) and len(container) <= _LONGEST:
            pairs = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in tuple(pairs):
                substitute = copied_iterator(value)
                if substitute is not None:
                    container[key] = substitute

    def put_back(self) -> None:
        container, items = self._container, self._items
        if not container and not items:
            return
        if isinstance(container, bytearray):
            container[:] = items
        elif len(container) != len(items) or any(
            one is not other for one, other in zip(_flat(container), _flat(items), strict=True)
        ):
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(items)


def _flat(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        for item in container.items():
            yield from item
    else:
        yield from container


def copied_iterator(value: Any) -> Any:
    """Copy an iterator over something that exists already, at the same position.

    Returns ``None`` for anything else, and for an iterator that computes, such as a generator.
    """
    kind = type(value)
    if kind.__module__ not in ("builtins", "itertools") or not isinstance(value, Iterator):
        return None
    if isinstance(value, types.GeneratorType):
        return None
    try:
        reduced: Any = value.__reduce__()
        make, arguments, *states = reduced
        made = make(*(copied_iterator(one) or one for one in arguments))
        for state in states[:1]:
            if state is not None:
                made.__setstate__(state)
    except (TypeError, AttributeError, ValueError):
        return None
    return made


class _Tensor:
    """A tensor and its bytes. If the step did not write to it, neither does this."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._data = tensor.detach() if tensor.is_inference() else tensor.data
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


def _write_back(tensor: torch.Tensor, content: torch.Tensor) -> None:
    if not _same_bytes(tensor, content):
        tensor.copy_(content)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is not torch.strided or one.is_quantized:
        return False
    return same_values(one, other) and not _signs_differ(one, other)


def _signs_differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Equal numbers with different bytes: zeros of either sign.
    return one.is_floating_point() and bool((torch.signbit(one) != torch.signbit(other)).any())


def random_state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None,
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def set_random_state(state: tuple[Any, ...]) -> None:
    of_torch, of_cuda, of_python, of_numpy = state
    torch.set_rng_state(of_torch)
    if of_cuda is not None:
        torch.cuda.set_rng_state_all(of_cuda)
    random.setstate(of_python)
    if of_numpy is not None:
        sys.modules["numpy"].random.set_state(of_numpy)


def same_random_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same = torch.equal(one[0], other[0]) and all(map(torch.equal, one[1] or (), other[1] or ()))
    of_numpy = one[3] is None or (one[3][2] == other[3][2] and bool((one[3][1] == other[3][1]).all()))
    return same and one[2] == other[2] and of_numpy


def draw_from(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
