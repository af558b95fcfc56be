"""The stacks of modes that a program may be in, left as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_active: Callable[[Any], Any] = torch._C._get_dispatch_mode
_INNER = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def taken_off(mode: Any = None) -> list[Any]:
    """Take ``mode`` (or, for ``None``, all) and what lies above it off the stack of dispatch modes; return the others,
    lowest first."""
    taken: list[Any] = []
    while torch._C._len_torch_dispatch_stack():
        top = torch._C._pop_torch_dispatch_stack(None)
        if top is mode:
            break
        taken.append(top)
    return taken[::-1]


def put_on(modes: Iterable[Any]) -> None:
    """Put dispatch modes on their stack, lowest first."""
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Look at tensors above the dispatcher, unseen by the modes of anybody and by autograd."""
    modes = taken_off()
    try:
        with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
            yield
    finally:
        put_on(modes)


def tracing() -> bool:
    """Whether what runs is traced or faked: its tensors have no content, and are no part of the training."""
    return any(_active(key) is not None for key in _INNER)
