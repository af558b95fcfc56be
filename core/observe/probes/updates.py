"""What an optimizer's step does to weights that are kept in low precision."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import FunctionType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.tensors import PLAIN
from ampcheck.observe.walk import dtype_name, tensor_names
from ampcheck.trace import Updates

_LOW = frozenset({torch.float16, torch.bfloat16})
_SAMPLE = 512
# They move no weight by much more than the learning rate.
_BOUNDED = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")


class _Before(NamedTuple):
    parameter: torch.Tensor
    values: torch.Tensor
    gradients: torch.Tensor
    optimizer: str
    lr: float
    largest_lr: float


class UpdateProbe:
    """Compares a sample of the elements of float16 and bfloat16 parameters before and after PyTorch's own optimizers
    step. Others may round in their own way, or keep a float32 copy."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.error: Exception | None = None
        self.updates: tuple[Updates, ...] = ()
        self._model = model
        self._optimizers = list(optimizers)
        self._before: dict[int, _Before] = {}
        self._thread = threading.get_ident()
        self._listening = Listening()

    def __enter__(self) -> UpdateProbe:
        self._thread = threading.get_ident()
        steps = {type(one).step for one in self._optimizers if type(one).__module__.startswith("torch.optim")}
        if any(parameter.dtype in _LOW for parameter in self._model.parameters()):
            for step in steps:
                if isinstance(step, FunctionType):
                    self._listening.to(step, before=self._will_step)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()
        self._compare()
        self._before.clear()
        self._optimizers.clear()

    @contained
    def _will_step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or all(optimizer is not one for one in self._optimizers):
            return
        with alone():
            for group in optimizer.param_groups:
                lr = float(group.get("lr", 0.0))
                largest = max(float(group.get(name) or 0.0) for name in ("lr", "initial_lr", "max_lr"))
                for parameter in group["params"]:
                    gradient = parameter.grad
                    usable = type(parameter) in PLAIN and parameter.is_contiguous() and parameter.numel()
                    if parameter.dtype not in _LOW or gradient is None or gradient.is_sparse or not usable:
                        continue
                    kind = type(optimizer).__name__
                    self._before[id(parameter)] = _Before(
                        parameter, _sample(parameter), _sample(gradient.contiguous()), kind, lr, largest
                    )

    @contained
    def _compare(self) -> None:
        if not self._before:
            return
        names = tensor_names(self._model)
        with alone():
            self.updates = tuple(
                self._compared(one, names[key]) for key, one in self._before.items() if key in names and one.lr > 0
            )

    def _compared(self, before: _Before, name: str) -> Updates:
        after = _sample(before.parameter)
        moving = before.gradients != 0
        unmoved = moving & (after == before.values)
        largest = torch.full_like(before.values, before.largest_lr, dtype=torch.float64)
        if before.optimizer not in _BOUNDED:
            largest = largest * before.gradients.double().abs()
        values = before.values.double()
        would = ((values + largest).to(after.dtype) != before.values) | (
            (values - largest).to(after.dtype) != before.values
        )
        return Updates(
            name,
            name.rpartition(".")[0],
            dtype_name(before.parameter.dtype),
            int(moving.sum()),
            int(unmoved.sum()),
            before.lr,
            before.largest_lr,
            int((unmoved & would).sum()),
            before.optimizer in _BOUNDED,
        )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().view(-1)
    stride = max(1, flat.numel() // _SAMPLE)
    return flat[::stride][:_SAMPLE].clone()
