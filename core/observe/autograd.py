"""Walks over an autograd graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ampcheck.observe.tensors import tensors_in

_AUTOGRAD: Any = torch._C._autograd


def nodes_behind(values: Any, most: int | None = None) -> Iterator[Any]:
    """Yield the graph nodes behind the tensors in ``values``, nearest first, and at most ``most`` of them."""
    pending = deque(tensor.grad_fn for tensor in tensors_in(values))
    seen = set[Any]()
    while pending and (most is None or len(seen) < most):
        node = pending.popleft()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def graph_behind(values: Any) -> list[Any]:
    """All graph nodes behind the tensors in ``values``, in no order: for a large graph this is faster."""
    pending = [tensor.grad_fn for tensor in tensors_in(values)]
    seen = set[Any]()
    nodes: list[Any] = []
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.append(node)
            for following, _ in node.next_functions:
                pending.append(following)
    return nodes


def leaves_behind(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that get gradients in a backward pass from the tensors in ``values``."""
    for node in graph_behind(values):
        if type(node).__name__ == "AccumulateGrad" and isinstance(node.variable, torch.Tensor):
            yield node.variable


def saved_slots(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the slots of a node by name, each with what PyTorch saved there: a ``SavedTensor`` or several."""
    kind = type(node)
    names = _SLOTS.get(kind)
    if names is None:
        names = _SLOTS[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    for name in names:
        try:
            saved = getattr(node, name)
        except RuntimeError:  # once backward went through it, a custom function's node holds nothing any more
            continue
        yield name.removeprefix("_raw_saved_"), saved


_SLOTS: dict[type, tuple[str, ...]] = {}


def slot_value(node: Any, slot: str) -> Any:
    """What a slot holds: a tensor, or several. Raises PyTorch's own errors if it is stale or freed."""
    # Nodes of custom functions spell it without the underscore.
    return node.saved_tensors if slot == "tensors" else getattr(node, f"_saved_{slot}")


def active_hooks() -> Callable[..., Any] | bool:
    """The innermost pack hook for saved tensors: false if there is none, true if PyTorch does not say which."""
    if hasattr(_AUTOGRAD, "_top_saved_tensors_default_hooks"):
        top = _AUTOGRAD._top_saved_tensors_default_hooks(True)
        return top[0] if top else False
    if not _AUTOGRAD._saved_tensors_hooks_is_enabled():
        return False
    try:
        # This PyTorch does not say which, but refuses to disable hooks while some are active.
        _AUTOGRAD._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        _AUTOGRAD._saved_tensors_hooks_enable()
    return False


def is_pytorchs_hook(hook: Any) -> bool:
    """Whether a saved-tensor hook is PyTorch's own, such as a checkpoint's."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")
