"""Find the tensors in arguments and results, and compare their storages and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether reading a tensor takes neither other processes nor a device that there is not."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_meta


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists, tuples and dicts, in order. Enters a container once: it may hold itself."""
    pending, entered = [value], dict[int, Any]()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in entered:
            entered[id(value)] = value
            pending += reversed(value.values() if isinstance(value, dict) else value)


def operands_in(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of an op, which nests lists one deep."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, torch.Tensor):
                    yield item


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of the same shape are equal in every element; NaN equals NaN."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def storage_key(tensor: torch.Tensor) -> int | None:
    """A key for the tensor's storage; ``None`` if it has none."""
    try:
        key: int = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None
    return key
