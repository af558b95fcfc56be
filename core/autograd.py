"""Walks over an autograd graph, and over the tensors in what is called and returned."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            pending += reversed(value.values())
        elif isinstance(value, (list, tuple)):
            pending += reversed(value)


def nodes_behind(values: Any, most: int | None = None) -> Iterator[Any]:
    """The nodes of the graph behind the tensors in ``values``, nearest first; at most ``most`` of them."""
    pending = deque(tensor.grad_fn for tensor in tensors_in(values))
    seen = set[Any]()
    while pending and (most is None or len(seen) < most):
        node = pending.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def leaves_behind(values: Any) -> Iterator[torch.Tensor]:
    """The tensors that a backward pass from the tensors in ``values`` gives gradients to."""
    for node in nodes_behind(values):
        if isinstance(variable := getattr(node, "variable", None), torch.Tensor):
            yield variable
