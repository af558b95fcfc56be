"""Cut what a program holds off from the graphs it was computed in."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import nn

from ampcheck.observe.state import is_of_library

# Beyond these a program holds data rather than state.
_MOST_OBJECTS, _LONGEST = 10_000, 1_000


def without_graphs(names: dict[str, Any]) -> dict[str, Any]:
    """The variables with tensors that have no graph of earlier steps behind them.

    Attributes of objects are changed where they are, so everything has to be put back afterwards.
    """
    entered: dict[int, Any] = {}
    return {name: _cut(value, entered) for name, value in names.items()}


def _cut(value: Any, entered: dict[int, Any]) -> Any:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return _begun_anew(value) if value.grad_fn is not None else value
    if id(value) in entered or len(entered) > _MOST_OBJECTS:
        return value
    if kind in (list, tuple, deque, dict) and len(value) <= _LONGEST:
        entered[id(value)] = value
        return _cut_items(value, entered)
    if isinstance(value, nn.Module):
        for module in value.modules():
            _cut_attributes(module, entered)
            _cut_attributes(module, entered, module._buffers)
    elif not isinstance(value, type) and not is_of_library(kind):
        _cut_attributes(value, entered)
    return value


def _begun_anew(tensor: torch.Tensor) -> torch.Tensor:
    # It still requires grad, so that what is computed with it saves the same, and is no leaf, which could not be
    # written to.
    with torch.enable_grad():
        return tensor.detach().requires_grad_().clone()


def _cut_items(value: Any, entered: dict[int, Any]) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    cut = {key: _cut(item, entered) for key, item in items}
    if all(cut[key] is item for key, item in (value.items() if isinstance(value, dict) else enumerate(value))):
        return value
    if isinstance(value, dict):
        return cut
    return deque(cut.values(), value.maxlen) if isinstance(value, deque) else type(value)(cut.values())


def _cut_attributes(owner: Any, entered: dict[int, Any], attributes: Any = None) -> None:
    attributes = getattr(owner, "__dict__", None) if attributes is None else attributes
    if not isinstance(attributes, dict) or id(attributes) in entered:
        return
    entered[id(attributes)] = attributes
    for name, value in tuple(attributes.items()):
        cut = _cut(value, entered)
        if cut is not value:
            attributes[name] = cut
