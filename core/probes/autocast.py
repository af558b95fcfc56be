"""Which autocast regions are entered, where, and what torch makes of them."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from ampcheck.probes.containment import as_caller, contained, hide_frame
from ampcheck.source import entered_by_user, region_site
from ampcheck.trace import AutocastRegion, AutocastState, described
from ampcheck.walk import dtype_name


def autocast_state(device_type: str) -> AutocastState:
    """Autocast of the running thread for a device type; ``device_type`` must be one autocast knows."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return _state(device_type, enabled, dtype, torch.is_autocast_cache_enabled())


@functools.cache
def _state(device_type: str, enabled: bool, dtype: torch.dtype, cache: bool) -> AutocastState:
    return AutocastState(device_type, enabled, dtype_name(dtype), cache)


class AutocastProbe:
    """Records every ``torch.autocast`` region entered while it is active, in any thread.

    ``torch.autocast`` offers no hook, so its three methods are wrapped on the class and put back on exit. Regions
    that compiled code enters do not pass through them and are not seen. While ``waiting`` for a step it keeps only
    the regions that are open.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.regions: list[AutocastRegion] = []
        self.waiting = False
        self._open = 0
        self.cache_cleared = False
        self._clear = torch.clear_autocast_cache
        self._requested: weakref.WeakKeyDictionary[torch.autocast, bool] = weakref.WeakKeyDictionary()
        self._local = _Local()
        self._originals: dict[str, Any] = {}

    @property
    def current(self) -> int | None:
        """Index of the innermost region the running thread is in."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def around(self) -> Iterator[AutocastRegion]:
        """The regions the running thread is in, innermost first."""
        return (self.regions[index] for index in reversed(self._stack))

    def forget(self) -> None:
        """Let go of the regions that ended, unless one is open still."""
        if not self._open:
            self.regions.clear()

    @property
    def _stack(self) -> list[int]:
        return self._local.stack

    def __enter__(self) -> AutocastProbe:
        self.regions, self._local, self._open = [], _Local(), 0
        cls = torch.autocast
        self._originals = {name: cls.__dict__[name] for name in ("__init__", "__enter__", "__exit__")}
        init, enter, leave = self._originals.values()
        probe = self

        @functools.wraps(init)
        def __init__(self: torch.autocast, *args: Any, **kwargs: Any) -> None:
            try:
                as_caller(sys._getframe(1))(init, self, *args, **kwargs)
            except BaseException as error:
                hide_frame(error)
                hide_frame(error)
                if sys.version_info < (3, 11):
                    # A bare `raise` would bring back both.
                    raise error
                raise
            probe._made(self, *args, **kwargs)

        @functools.wraps(enter)
        def __enter__(self: torch.autocast) -> Any:
            result = enter(self)
            try:
                probe._entered(self)
            except BaseException:
                # An interrupt: no `with` block was begun that would leave the region.
                leave(self, None, None, None)
                raise
            return result

        @functools.wraps(leave)
        def __exit__(self: torch.autocast, *exc: Any) -> Any:
            try:
                probe._left(*exc)
            finally:
                left = leave(self, *exc)
            return left

        for wrapper in (__init__, __enter__, __exit__):
            setattr(cls, wrapper.__name__, wrapper)
        clear = self._clear = torch.clear_autocast_cache

        @functools.wraps(clear)
        def clear_autocast_cache() -> None:
            self._cleared()
            clear()

        torch.clear_autocast_cache = clear_autocast_cache
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, original in self._originals.items():
            setattr(torch.autocast, name, original)
        torch.clear_autocast_cache = self._clear

    @contained
    def _made(
        self,
        region: torch.autocast,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self._requested[region] = bool(enabled)

    @contained
    def _cleared(self) -> None:
        # The end of an outermost region clears the cache too, when the stack is empty already.
        self.cache_cleared = self.cache_cleared or self.current is not None

    @contained
    def _left(self, kind: Any = None, error: BaseException | None = None, traceback: Any = None) -> None:
        if self._stack:
            index = self._stack.pop()
            self._open -= 1
            if error is not None:
                self.regions[index] = dataclasses.replace(self.regions[index], left_by=described(error))
        if self.waiting:
            self.forget()

    @contained
    def _entered(self, region: torch.autocast) -> None:
        kind = type(region)
        old = f"{kind.__module__.removesuffix('.autocast_mode')}.autocast" if kind in _DEPRECATED else None
        index = len(self.regions)
        self.regions.append(
            AutocastRegion(
                index=index,
                device_type=region.device,
                dtype=dtype_name(region.fast_dtype),
                enabled=region._enabled,
                requested=self._requested.get(region),
                cache=region._cache_enabled,
                site=region_site(),
                deprecated=old,
                outer=self.current,
                by_user=entered_by_user(),
            )
        )
        self._stack.append(index)
        self._open += 1


class _Local(threading.local):
    """Indices of the regions that each thread is in, outermost first."""

    def __init__(self) -> None:
        self.stack: list[int] = []


_DEPRECATED = (torch.cuda.amp.autocast_mode.autocast, torch.cpu.amp.autocast_mode.autocast)
