"""What was seen of the autograd graph: writes, saves, views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ampcheck.trace.site import Site

Writer = Literal["code", "optimizer", "buffer-broadcast", "parameter-gather"]
Silent = Literal["untracked", "hooks", "outside", "unmarked"]


@dataclass(frozen=True)
class Write:
    """A write to a tensor's memory. ``by`` says what wrote: the code, an optimizer, or data-parallel training, which
    broadcasts the buffers of rank 0. ``library`` is the line of a library other than PyTorch that the user's line led
    to. Versions and shape are those of the written tensor."""

    op: str
    site: Site | None
    library: Site | None = None
    by: Writer = "code"
    version_before: int | None = None
    version_after: int | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class StaleTensor:
    """A saved tensor that was overwritten after autograd saved it.

    ``node`` and ``slot`` say what saved it (``ReluBackward0``, ``result``), ``op`` is the op of the forward pass, and
    ``name`` that of the parameter or buffer, if it is one. ``writes`` are those since the save, earliest first; none if
    the write was not seen. ``silent`` says why PyTorch's own check passed it: ``"untracked"``, the write bypassed the
    version counter; ``"hooks"``, saved-tensor hooks; ``"outside"``, the content changed without a PyTorch op;
    ``"unmarked"``, a custom function wrote to its input without ``mark_dirty``. ``None``: PyTorch found it. ``shared``
    is the call that gave the memory to NumPy, if ``"outside"``.
    """

    node: str
    slot: str | None
    dtype: str
    shape: tuple[int, ...]
    op: str | None = None
    save: Site | None = None
    library: Site | None = None
    writes: tuple[Write, ...] = ()
    version_saved: int | None = None
    version_found: int | None = None
    name: str | None = None
    buffer: bool = False
    silent: Silent | None = None
    shared: Site | None = None


@dataclass(frozen=True)
class UncheckedSave:
    """A tensor that saved-tensor hooks returned without a copy, so nothing checks its version. ``hooks`` is the site of
    the hook that packed it, if this PyTorch can tell."""

    node: str
    save: Site | None
    hooks: Site | None


class Carried(NamedTuple):
    """A variable by which a step takes over a graph from the one before: the statement that would detach it, and the
    line of the step to put it after."""

    detached: str
    after: Site


@dataclass(frozen=True)
class GraphTrace:
    """What the write probe saw of the autograd graph. The first of ``stale`` is the one that backward met first.

    ``views`` are the calls that returned several views at once (``split``, ``unbind``), ``inference`` those that
    made tensors under ``inference_mode``, ``backwards`` the backward passes begun, and ``cut`` the calls after which
    the failing loss has no graph: each the site of the call, the latest last. ``hooked`` names the modules with full
    backward hooks, and ``replay`` says how a replay of the failing batch went, if there was one. ``written_views`` are
    those of ``views`` whose base was modified later, each with the writes. ``carried``, if not ``None``: the step was
    replayed together with the one before it, from which it takes over a graph, by these variables as far as they are
    known.
    """

    stale: tuple[StaleTensor, ...] = ()
    unchecked: tuple[UncheckedSave, ...] = ()
    views: tuple[Site, ...] = ()
    inference: tuple[Site, ...] = ()
    backwards: tuple[Site, ...] = ()
    cut: tuple[Site, ...] = ()
    hooked: tuple[str, ...] = ()
    replay: str | None = None
    written_views: tuple[tuple[Site, tuple[Site, ...]], ...] = ()
    carried: tuple[Carried, ...] | None = None
