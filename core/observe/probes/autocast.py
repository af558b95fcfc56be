"""The autocast regions a step enters: where, and what PyTorch makes of them."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch

from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import entered_by_user, region_site
from ampcheck.trace import AutocastRegion, AutocastState, described


def autocast_state(device_type: str) -> AutocastState:
    """The running thread's autocast state for ``device_type``, which must be one that autocast knows."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return _state(device_type, enabled, dtype, torch.is_autocast_cache_enabled())


@functools.cache
def _state(device_type: str, enabled: bool, dtype: torch.dtype, cache: bool) -> AutocastState:
    return AutocastState(device_type, enabled, dtype_name(dtype), cache)


class AutocastProbe:
    """Records every ``torch.autocast`` region entered while it is active, in any thread.

    It does not see regions that compiled code enters. While ``waiting`` for a step it keeps only open regions.
    ``local.stack`` holds the indices of the regions that each thread is in, outermost first.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.regions: list[AutocastRegion] = []
        self.waiting = False
        self._open = 0
        self.cache_cleared = False
        self.left: int | None = None
        """Sequence number of the next node when the thread left a region that it had entered before the probe."""
        self._spans: list[Span] = []
        self._listening = Listening()
        self._requested: weakref.WeakKeyDictionary[torch.autocast, bool] = weakref.WeakKeyDictionary()
        self.local = _Local()

    @property
    def current(self) -> int | None:
        """Index of the innermost region that the running thread is in."""
        stack = self._stack
        return stack[-1] if stack else None

    @property
    def around(self) -> Iterator[AutocastRegion]:
        """The regions that the running thread is in, innermost first."""
        return (self.regions[index] for index in reversed(self._stack))

    def at(self, sequence: int, device_type: str) -> Span | None:
        """The innermost region for ``device_type`` in which the running thread made node number ``sequence``."""
        thread = threading.get_ident()
        inside = (span for span in self._spans if span.thread == thread and span.around(sequence))
        return max((span for span in inside if span.region.is_for(device_type)), key=_since, default=None)

    def forget(self) -> None:
        """Drop the regions that have ended, unless one is still open."""
        if not self._open:
            self.regions.clear()
            self._spans.clear()

    @property
    def _stack(self) -> list[int]:
        return self.local.stack

    def __enter__(self) -> AutocastProbe:
        self.regions, self.local, self._open, self._spans = [], _Local(), 0, []
        self.left = None
        cls: Any = torch.autocast
        self._listening.to(cls.__init__, after=self._made)
        self._listening.to(cls.__enter__, after=self._did_enter)
        self._listening.to(cls.__exit__, before=self._will_leave)
        self._listening.to_attribute(torch, "clear_autocast_cache", _clearing, self._cleared)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()

    @contained
    def _made(
        self,
        result: None,
        region: torch.autocast,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        self._requested[region] = bool(enabled)

    @contained
    def _cleared(self) -> None:
        # Leaving the outermost region clears the cache too, but by then the stack is empty.
        self.cache_cleared = self.cache_cleared or self.current is not None

    def _will_leave(self, region: torch.autocast, *exc: Any) -> None:
        try:
            self._left(*exc)
        except BaseException:
            # An interrupt: the region must still be left.
            self.error = self.error or RuntimeError("interrupted")
            region.__exit__(*exc)
            raise

    @contained
    def _left(self, kind: Any = None, error: BaseException | None = None, traceback: Any = None) -> None:
        if not self._stack and self.left is None:
            self.left = _sequence_nr()
        if self._stack:
            index = self._stack.pop()
            self._spans[index].until = _sequence_nr()
            self._open -= 1
            if error is not None:
                self.regions[index] = dataclasses.replace(self.regions[index], left_by=described(error))
        if self.waiting:
            self.forget()

    def _did_enter(self, result: Any, region: torch.autocast) -> None:
        try:
            self._entered(region)
        except BaseException:
            # An interrupt: no `with` block has begun that would leave the region.
            self.error = self.error or RuntimeError("interrupted")
            region.__exit__(None, None, None)
            raise

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
        self._spans.append(Span(self.regions[index], threading.get_ident(), _sequence_nr()))
        self._stack.append(index)
        self._open += 1


@dataclasses.dataclass
class Span:
    """The nodes made in a region, by their sequence numbers in its thread."""

    region: AutocastRegion
    thread: int
    since: int
    until: int | None = None

    def around(self, sequence: int) -> bool:
        return self.since <= sequence and (self.until is None or sequence < self.until)

    @property
    def state(self) -> AutocastState:
        region = self.region
        return AutocastState(region.device_type.partition(":")[0], region.enabled, region.dtype, region.cache)


def _since(span: Span) -> int:
    return span.since


_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr


class _Local(threading.local):
    """Indices of the regions that each thread is in, outermost first."""

    def __init__(self) -> None:
        self.stack: list[int] = []


_DEPRECATED = (torch.cuda.amp.autocast_mode.autocast, torch.cpu.amp.autocast_mode.autocast)


def _clearing(clear: Callable[[], None], listeners: list[Any]) -> Callable[[], None]:
    @functools.wraps(clear)
    def clear_autocast_cache() -> None:
        for _, cleared in listeners:
            cleared()
        clear()

    return clear_autocast_cache
