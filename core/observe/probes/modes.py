"""Look past the stacks of modes that a program may be in, and leave them as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_active: Callable[[Any], Any] = torch._C._get_dispatch_mode
_INNER = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def taken_off(mode: Any = None) -> list[Any]:
    """Pop ``mode`` (``None``: all) and the dispatch modes above it; return all but ``mode``, lowest first."""
    taken: list[Any] = []
    while torch._C._len_torch_dispatch_stack():
        top = torch._C._pop_torch_dispatch_stack(None)
        if top is mode:
            break
        taken.append(top)
    return taken[::-1]


def put_on(modes: Iterable[Any]) -> None:
    """Push dispatch modes onto their stack, lowest first."""
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Look at tensors unseen by anybody's modes and by autograd."""
    modes = taken_off()
    try:
        with torch._C.DisableTorchFunction(), torch._C._AutoDispatchBelowAutograd():
            yield
    finally:
        put_on(modes)


def tracing() -> bool:
    """Whether the running code is traced or faked: its tensors hold no data, and are not part of the training."""
    return any(_active(key) is not None for key in _INNER)
