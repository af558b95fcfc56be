"""What a step called, saved and wrote, as plain records."""

from __future__ import annotations

import contextlib
import functools
import gc
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.observe.probes.call_sites import CallSite
from ampcheck.observe.tensors import storage_key
from ampcheck.observe.walk import hooked_modules, plain_name
from ampcheck.trace import Silent, Site, StaleTensor, UncheckedSave, Write

Layout = tuple[int, tuple[int, ...], tuple[int, ...]]
Hooks = Callable[..., Any] | bool

_SEVERAL_VIEWS = frozenset({"aten::split", "aten::split_with_sizes", "aten::unbind"})


class GraphOp:
    """An op that made an autograd node; for a custom function, the first op inside it.

    ``keys`` are the storages it took (the first ``taken``) and returned. ``hooks`` is the pack hook under which its
    tensors were saved (true: an unknown one).
    """

    __slots__ = ("call_site", "event", "func", "hooks", "keys", "module", "on_view", "sequence", "taken")

    def __init__(
        self, event: int, sequence: int, func: Any, call_site: CallSite, module: str | None, hooks: Hooks
    ) -> None:
        self.event = event
        self.sequence = sequence
        self.func = func
        self.keys: tuple[int, ...] = ()
        self.taken = 0
        self.on_view = False
        self.call_site = call_site
        self.module = module
        self.hooks = hooks


class Overwrite:
    """A write to a storage.

    ``version`` is the target's before the write, ``after`` the one after it. ``layout`` is offset, shape and strides in
    elements of ``dtype``. ``changed`` says whether the content differs (``None``: not compared).
    """

    __slots__ = ("after", "call_site", "changed", "dtype", "event", "layout", "module", "op", "version")

    def __init__(self, event: int, op: str, call_site: CallSite, module: str | None, target: torch.Tensor) -> None:
        self.event = event
        self.op = op
        self.call_site = call_site
        self.module = module
        self.version = None if target.is_inference() else target._version
        self.after = None if self.version is None else self.version + 1
        self.layout = layout_of(target)
        self.dtype = target.dtype
        self.changed: bool | None = None

    def told(self) -> Write:
        return Write(
            self.op,
            self.call_site.site("write", module=self.module, op=self.op),
            self.call_site.library_site("write", module=self.module, op=self.op),
            self.call_site.writer,
            self.version,
            self.after,
            self.layout[1],
        )


class Derived(NamedTuple):
    """What the tensors of a storage were computed from, and by which call. ``cut``: the call lost the graph."""

    op: str
    call_site: CallSite
    module: str | None
    sources: tuple[int, ...]
    cut: bool


class GraphLog:
    """The ops that made autograd nodes, by the nodes' sequence numbers, and the writes to the storages they used.

    ``stale`` holds what backward read although it was overwritten, by op and storage. The log holds no tensor. It holds
    storages by weak references, which keep an address from being reused, but not the memory.
    """

    def __init__(self) -> None:
        self.stale: dict[tuple[int, int], StaleTensor] = {}
        self.unchecked: dict[Any, UncheckedSave] = {}
        self.hooked: tuple[str, ...] = ()
        self.names: dict[int, tuple[str, bool]] = {}
        self.ops: dict[int, GraphOp] = {}
        self.made: dict[int, GraphOp] = {}
        # Arrays of numbers cost the garbage collector nothing; lists of ops would cost it more than all the rest.
        self.users: dict[int, array[int]] = {}
        self.written: dict[int, list[Overwrite]] = {}
        self.derived: dict[int, Derived] = {}
        self.begun: dict[int, CallSite] = {}
        self.under_inference: dict[CallSite, None] = {}
        self.shared: dict[int, CallSite] = {}
        self.pinned: dict[int, int] = {}

    def __del__(self) -> None:
        storage: Any = torch.UntypedStorage
        # If `__init__` failed, there are none.
        for reference in vars(self).get("pinned", {}).values():
            storage._free_weak_ref(reference)

    def name(self, model: nn.Module) -> None:
        """Know the parameters and buffers of ``model``, and its modules with full backward hooks, by name."""
        self.hooked = hooked_modules(model)
        for buffer, tensors in ((True, model.named_buffers()), (False, model.named_parameters())):
            for name, tensor in tensors:
                key = storage_key(tensor)
                if key is not None:
                    self.names[key] = (plain_name(name), buffer)

    def _was_made(self, key: int) -> bool:
        """Whether an op returned a tensor of this storage, as none returns a parameter."""
        ops = (self.made[event] for event in self.users.get(key, ()))
        derived = self.derived.get(key)
        # A view of a parameter, and a write to it, take its storage and return it.
        made = derived is not None and key not in derived.sources
        return made or any(key in op.keys[op.taken :] for op in ops)

    @functools.cached_property
    def _others(self) -> dict[int, tuple[str, bool]]:
        """The parameters and buffers of all other modules, by their outermost module's class and their name there."""
        modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module) and "_modules" in vars(one)]
        found: dict[int, tuple[str, bool]] = {}
        for one in sorted(modules, key=lambda module: sum(1 for _ in nn.Module.modules(module))):
            for buffer, named in ((True, nn.Module.named_buffers), (False, nn.Module.named_parameters)):
                # A module may be half built.
                with contextlib.suppress(Exception):
                    for name, tensor in named(one):
                        key = storage_key(tensor)
                        if key is not None:
                            found[key] = f"{type(one).__name__}.{plain_name(name)}", buffer
        return found

    def wrote(self, key: int, write: Overwrite) -> None:
        self.written.setdefault(key, []).append(write)

    def op_of(self, node: Any) -> GraphOp | None:
        """The op that made ``node``."""
        sequence: int = node._sequence_nr()
        if not is_copy_slices(node):
            return self.ops.get(sequence)
        # An in-place op on a view makes its own node, then this one around it, and one for the view.
        numbers = range(sequence - 1, sequence - 4, -1)
        ops = (self.ops.get(number) for number in numbers)
        return next((op for op in ops if op is not None and op.sequence < sequence), None)

    def writes(self, key: int | None, since: int) -> list[Overwrite]:
        """The writes to a storage after an event, earliest first."""
        return [] if key is None else [write for write in self.written.get(key, ()) if write.event > since]

    def pin(self, key: int, tensor: torch.Tensor) -> None:
        """Keep the storage's address from being reused, by holding the storage weakly."""
        if key not in self.pinned:
            storage: Any = tensor.untyped_storage()
            self.pinned[key] = storage._weak_ref()

    def cut(self, tensor: torch.Tensor) -> Site | None:
        """The latest call on the way to ``tensor`` that took tensors with a graph and returned one without.

        If there is none, the call that made it from nothing.
        """
        pending, seen = [storage_key(tensor)], set()
        made: Derived | None = None
        while pending:
            key = pending.pop(0)
            derived = self.derived.get(key) if key is not None else None
            if derived is None or key in seen:
                continue
            seen.add(key)
            if derived.cut:
                return derived.call_site.site("call", module=derived.module, op=derived.op)
            made = derived if not derived.sources else made
            pending += [source for source in derived.sources if source != key]
        return made.call_site.site("call", module=made.module, op=made.op) if made else None

    def views(self) -> tuple[Site, ...]:
        """The calls that returned several views at once, in order."""
        ops = dict.fromkeys(op for op in self.ops.values() if op_name(op.func) in _SEVERAL_VIEWS)
        return _each_once(op.call_site.site("call", module=op.module, op=op_name(op.func)) for op in ops)

    def written_views(self) -> tuple[tuple[Site, tuple[Site, ...]], ...]:
        """The calls of ``views`` whose base was later written to, through any view of it, with those writes."""
        found: dict[GraphOp, tuple[Site, tuple[Site, ...]]] = {}
        for op in self.ops.values():
            if op not in found and op_name(op.func) in _SEVERAL_VIEWS:
                view = op.call_site.site("call", module=op.module, op=op_name(op.func))
                writes = _each_once(write.told().site for key in op.keys[:1] for write in self.writes(key, op.event))
                if view is not None and writes:
                    found[op] = view, writes
        return tuple(found.values())

    def backwards(self) -> tuple[Site, ...]:
        """The backward passes that this thread started, in order."""
        sites = (call_site.site("call") for call_site in self.begun.values())
        return tuple(site for site in sites if site is not None)

    def inference(self) -> tuple[Site, ...]:
        """The calls that made tensors under ``inference_mode``, latest last."""
        return _each_once(call_site.site("call") for call_site in self.under_inference)

    def told(
        self,
        op: GraphOp | None,
        node: Any,
        slot: str | None,
        key: int | None,
        dtype: str,
        shape: tuple[int, ...],
        writes: Sequence[Overwrite],
        *,
        versions: tuple[int | None, int | None] = (None, None),
        silent: Silent | None = None,
    ) -> StaleTensor:
        """A stale tensor with its sites. ``key`` is its storage, ``versions`` are the saved and the found one."""
        saved, found = versions
        known = None if key is None else self.names.get(key)
        if known is None and key is not None and not self._was_made(key):
            known = self._others.get(key)
        name, buffer = known or (None, False)
        stale = StaleTensor(node.name(), slot, dtype, shape, None, None, None, (), saved, found, name, buffer, silent)
        if op is None:
            return stale
        call_site = op.call_site.applied(getattr(type(node), "_forward_cls", None))
        facts = {"module": op.module, "node": node.name(), "slot": slot}
        shared = self.shared.get(key) if key is not None and silent == "outside" else None
        return replace(
            stale,
            op=op_name(op.func),
            save=call_site.site("save", **facts),
            library=call_site.library_site("save", **facts),
            writes=tuple(write.told() for write in writes),
            shared=shared.site("call") if shared is not None else None,
        )


def op_name(func: Any) -> str:
    """``aten::mul_`` for ``torch.ops.aten.mul_.Tensor``, ``torch.ops.aten.mul_`` and ``torch.mul_``."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return str(schema.name)
    return str(getattr(func, "_qualified_op_name", f"aten::{getattr(func, '__name__', func)}"))


def is_copy_slices(node: Any) -> bool:
    """Whether a node stands for an in-place op on a view; it hides the op's own node."""
    name: str = node.name()
    return name.endswith("CopySlices")


def layout_of(tensor: torch.Tensor) -> Layout:
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def unchecked_save(hook: Any, node: str, call_site: CallSite, module: str | None) -> UncheckedSave:
    """A save under a hook that returns the tensor itself, with the hook's line if it is a Python function."""
    code = getattr(hook, "__code__", None)
    hooks = CallSite((code, 0), None).site("call") if code is not None else None
    return UncheckedSave(node, call_site.site("save", module=module, node=node), hooks)


def _each_once(sites: Iterable[Site | None]) -> tuple[Site, ...]:
    return tuple(dict.fromkeys(site for site in sites if site is not None))
