"""Keep a probe's faults inside the probe."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from ampcheck.source.lines import is_ours

P = ParamSpec("P")


class Contained(Protocol):
    """``error`` is the first exception that a callback of the probe raised; from then on the probe sees nothing."""

    error: Exception | None


S = TypeVar("S", bound=Contained)


def contained(callback: Callable[Concatenate[S, P], Any]) -> Callable[Concatenate[S, P], None]:
    """Keep a callback of a probe from raising into the training that it watches."""

    @functools.wraps(callback)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        # Dynamo must trace the user's program alone.
        if torch.compiler.is_dynamo_compiling() or self.error is not None:
            return
        try:
            callback(self, *args, **kwargs)
        except RecursionError:
            # The program is at the recursion limit: that is not our fault, and need not be its own.
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, it is our fault and not the user's
            self.error = bare(error)

    return call


def undo(removal: Callable[..., object], *args: Any) -> None:
    """Remove something by a call that does nothing if it is already gone.

    If the call fails or is interrupted, repeat it once before raising.
    """
    try:
        removal(*args)
    except BaseException:
        with contextlib.suppress(Exception):
            removal(*args)
        raise


def bare(error: Exception) -> Exception:
    """Strip ``error`` of the frames it came through, which hold the model and its tensors, so that it can be kept."""
    error.__traceback__ = error.__context__ = None
    return error


def hide_frame(error: BaseException) -> None:
    """Drop the caller's own frame, the first one, from the traceback; a bare ``raise`` does not add it back."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next


class _OwnFrameHidden:
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            hide_frame(error)


own_frame_hidden = _OwnFrameHidden()
"""Put around a call made for the program: an exception shows no frame of the function that holds the ``with`` block.

Up to Python 3.10 the frame comes back, and ``hide_frames`` removes it.
"""


def hide_frames(error: BaseException) -> None:
    """Remove AmpCheck's frames from the tracebacks of ``error`` and its causes, except the outermost of each.

    Before Python 3.11 a bare ``raise`` brings back what ``hide_frame`` removed.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        pending += [each.__cause__, each.__context__]
        entry = each.__traceback__
        while entry is not None:
            while entry.tb_next is not None and is_ours(entry.tb_next.tb_frame.f_code.co_filename):
                entry.tb_next = entry.tb_next.tb_next
            entry = entry.tb_next
