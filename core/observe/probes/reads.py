"""Check that backward reads what was saved for it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from ampcheck.observe.autograd import is_pytorchs_hook, saved_slots, slot_value
from ampcheck.observe.probes.call_sites import CallSite, CallSites
from ampcheck.observe.probes.graph_log import GraphLog, GraphOp, Hooks, Overwrite, layout_of, unchecked_save
from ampcheck.observe.tensors import operands_in, storage_key
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import qualified_name
from ampcheck.trace import Silent, StaleTensor

_current_node: Callable[[], Any] = torch._C._current_autograd_node


class BackwardReads:
    """Logs the saved tensors that backward reads although they were overwritten after the save.

    PyTorch's own check missed them: the write bypassed the version counter, or saved-tensor hooks are in the way.
    ``suspects`` are the storages written to in such a way, ``_shared`` those that something outside PyTorch sees too.
    """

    def __init__(self, log: GraphLog, call_sites: CallSites, current_module: Callable[[], str | None]) -> None:
        self.suspects: set[int] = set()
        self._shared: set[int] = set()
        self._foreign_hooks = False
        self._log = log
        self._call_sites = call_sites
        self._current_module = current_module
        self._unmarked: list[tuple[weakref.ref[torch.Tensor], int, Overwrite]] = []
        self._contents: dict[tuple[int, ...], float] = {}
        self._moved: dict[int, tuple[int, Overwrite]] = {}

    @property
    def needed(self) -> bool:
        """Whether backward may read anything that PyTorch's check misses."""
        return bool(self.suspects or self._shared or self._foreign_hooks)

    def saved_under(self, hooks: Hooks) -> None:
        self._foreign_hooks = self._foreign_hooks or _is_foreign(hooks)

    def moved(self, old: int, new: int, write: Overwrite) -> None:
        """Record that a tensor moved from storage ``old`` to ``new``: a node that saved it will read the new one."""
        self._moved[new] = old, write
        self.suspects |= {old, new}

    def written_unmarked(self, target: torch.Tensor, write: Overwrite) -> None:
        """Record a custom function's write to its input; unless it is marked dirty, the input keeps its history."""
        base = target if target._base is None else target._base
        if base.grad_fn is not None:
            self._unmarked.append((weakref.ref(base), base.grad_fn._sequence_nr(), write))

    def backward_begins(self) -> None:
        """Find the memory used by ops that something outside PyTorch shares by now."""
        storage: Any = torch.UntypedStorage
        for key in {key for _, key, *_ in self._contents}:
            # Memory shared with NumPy can no longer be resized.
            alive = storage._new_with_weak_ptr(self._log.pinned[key])
            if alive is not None and not alive.resizable():
                self._shared.add(key)

    def check(self, args: Sequence[Any], frame: FrameType | None) -> None:
        """Log which of the ``args`` that backward reads are saved tensors whose content has changed since the save."""
        node: Any = None
        for tensor in operands_in(args):
            key = storage_key(tensor)
            if key in self._moved:
                self._check_moved(tensor, *self._moved[key], node or _current_node())
            if key not in self._log.users:
                continue
            shared = key in self._shared
            if not (shared or key in self.suspects or self._foreign_hooks):
                continue
            node = node or _current_node()
            op = self._log.op_of(node) if node is not None else None
            if op is None:
                continue
            alias = key in op.keys
            if not alias:
                # A checkpoint recomputed it: the op that saved it is the same op, run again.
                users = (self._log.made[event] for event in self._log.users[key] if event > op.event)
                again = [user for user in users if user.func is op.func and user.module in (None, op.module)]
                if not _keeps_results(op, node):
                    # The recomputation ends before the last op whose tensors are needed: another op made this one.
                    again = [user for user in again if key in user.keys[: user.taken]]
                if not again or not op.hooks:
                    continue
                op = again[-1]
            stale = [
                write
                for write in self._log.writes(key, op.event)
                if write.changed is not False and _overlap(write, tensor)
            ]
            unchecked = alias and _is_foreign(op.hooks)
            outside = shared and not stale and self._content_differs(op, key, tensor)
            if not (stale or unchecked or outside) or self._call_sites.in_recomputation(frame):
                continue
            if (stale or outside) and (op.event, key) not in self._log.stale:
                silent: Silent = "outside" if outside else "hooks" if op.hooks else "untracked"
                slot = None if op.hooks else _slot_of(node, key)
                dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
                self._log.stale[op.event, key] = self._log.told(op, node, slot, key, dtype, shape, stale, silent=silent)
            if unchecked:
                self._log.unchecked.setdefault(op.hooks, unchecked_save(op.hooks, node.name(), op.call_site, op.module))

    def _check_moved(self, tensor: torch.Tensor, old: int, write: Overwrite, node: Any) -> None:
        """Log that backward reads memory assigned to a tensor after a node had saved what it held before."""
        op = self._log.op_of(node) if node is not None else None
        if op is None or op.event > write.event or old not in op.keys or not write.changed or op.hooks:
            return
        if (op.event, old) not in self._log.stale:
            slot = _slot_of(node, storage_key(tensor) or 0)
            dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            stale = self._log.told(op, node, slot, old, dtype, shape, [write], silent="untracked")
            self._log.stale[op.event, old] = stale

    def note_content(self, op: GraphOp, tensor: torch.Tensor, key: int) -> None:
        """Record a checksum of memory that something outside PyTorch may write to.

        Skips parameters and buffers: other processes may train them too, and batch norm updates its own.
        """
        if (
            tensor.is_cpu
            and tensor.is_floating_point()
            and tensor.layout is torch.strided
            and key not in self._log.names
        ):
            layout, total = _content(tensor)
            self._contents[(op.event, key, *layout)] = total

    def _content_differs(self, op: GraphOp, key: int, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` differs from what ``op`` saw, though nothing in PyTorch wrote to it."""
        layout, total = _content(tensor)
        written = max((write.event for write in self._log.written.get(key, ()) if write.event <= op.event), default=0)
        events = (event for event in reversed(self._log.users[key]) if written <= event <= op.event)
        noted = (self._contents.get((event, key, *layout)) for event in events)
        before = next((number for number in noted if number is not None), math.nan)
        return not math.isnan(before) and total != before

    def check_unmarked(self, args: Sequence[Any], frame: FrameType | None) -> None:
        """Log those ``args`` of a recorded op that a custom function wrote to without changing their history."""
        for tensor in operands_in(args):
            for reference, sequence, write in self._unmarked:
                if reference() is not tensor or tensor.grad_fn is None or tensor.grad_fn._sequence_nr() != sequence:
                    continue
                key = (write.event, sequence)
                if key not in self._log.stale:
                    use = self._call_sites.find(frame).site("call", module=self._current_module())
                    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
                    function = _function_name(write.call_site)
                    writes = (write.told(),)
                    self._log.stale[key] = StaleTensor(
                        function, None, dtype, shape, save=use, writes=writes, silent="unmarked"
                    )


def _content(tensor: torch.Tensor) -> tuple[tuple[int, ...], float]:
    """The elements that a tensor takes of its storage, and their sum in the order they lie there.

    The elements are one tuple of numbers, which costs the garbage collector nothing; the sum is the same for all
    transposes.
    """
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim]))
    laid = tensor.permute(order).squeeze() if order else tensor
    return (int(laid.storage_offset()), *laid.shape, *laid.stride()), float(laid.sum())


def _function_name(call_site: CallSite) -> str:
    """``Scale.forward``, for a call site in the forward of a custom function."""
    return qualified_name(call_site.user[0]) if call_site.user else "a custom function"


def _is_foreign(hooks: Hooks) -> bool:
    """Whether a hook is known, and not PyTorch's own."""
    return callable(hooks) and not is_pytorchs_hook(hooks)


def _keeps_results(op: GraphOp, node: Any) -> bool:
    """Whether a node has saved anything other than an argument of its op."""
    schema = getattr(op.func, "_schema", None)
    arguments = {argument.name for argument in schema.arguments} if schema is not None else set()
    return any(name not in arguments for name, _ in saved_slots(node))


def _slot_of(node: Any, key: int) -> str | None:
    """The slot of ``node`` that holds the storage ``key``."""
    for slot, _ in saved_slots(node):
        try:
            value = slot_value(node, slot)
        except RuntimeError:
            continue
        for tensor in operands_in((value,)):
            if tensor.untyped_storage()._cdata == key:
                return "saved_tensors" if slot == "tensors" else slot
    return None


def _overlap(write: Overwrite, tensor: torch.Tensor) -> bool:
    """Whether a write touched an element of ``tensor``, which shares its storage."""
    if write.dtype.itemsize != tensor.dtype.itemsize:
        return True
    layouts = (write.layout, layout_of(tensor))
    if any(0 in shape for _, shape, _ in layouts):
        return False
    ends = [
        offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 for offset, shape, stride in layouts
    ]
    touched = torch.zeros(max(ends), dtype=torch.bool)
    (offset, shape, stride), (other_offset, other_shape, other_stride) = layouts
    touched.as_strided(shape, stride, offset).fill_(True)
    return bool(touched.as_strided(other_shape, other_stride, other_offset).any())
