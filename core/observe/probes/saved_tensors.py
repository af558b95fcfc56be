"""The saved tensors of a graph on which backward failed, read from the graph itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from ampcheck.observe.autograd import nodes_behind, saved_slots, slot_value
from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.graph_log import GraphLog, GraphOp, Overwrite, is_copy_slices, op_name
from ampcheck.observe.walk import dtype_name, unwrapped
from ampcheck.trace import GraphTrace, StaleTensor

_VERSIONS = re.compile(r"is at version (\d+); expected version (\d+)")
_NODE = re.compile(r"which is output \d+ of (\w+?)(?:Backward\d*)?,")
_SHAPE = re.compile(r"\[[\w.]+ \[([\d, ]*)\]\]")


def graph_trace(probe: DispatchProbe, error: BaseException | None = None, *, replay: str | None = None) -> GraphTrace:
    """What ``probe`` saw, with the stale tensors behind ``error``. Raises the probe's first error."""
    if probe.error is not None:
        raise probe.error
    log = probe.log
    roots = _roots(error) if error is not None else ()
    cut = [log.cut(root) for root in roots if not root.requires_grad]
    found = stale_tensors(error, log) if error is not None else ()
    return GraphTrace(
        (*found, *log.stale.values()),
        tuple(log.unchecked.values()),
        log.views(),
        log.inference(),
        log.backwards(),
        tuple(site for site in cut if site is not None),
        log.hooked,
        replay,
        log.written_views(),
    )


def stale_tensors(error: BaseException, log: GraphLog) -> tuple[StaleTensor, ...]:
    """All stale tensors of the graph on which backward raised ``error``, the one it raised for first.

    Asks each slot of each node for its tensor, as backward would: PyTorch's own check names the stale ones. Skips slots
    under saved-tensor hooks, since reading them runs the hooks (a checkpoint's, for example).
    """
    found: list[tuple[int, int, StaleTensor]] = []
    hidden: list[tuple[int, int, StaleTensor]] = []
    for node in nodes_behind(_roots(error)):
        op = log.op_of(node)
        if op is not None and op.hooks:
            continue
        if op is not None and is_copy_slices(node):
            hidden += [(rank, op.sequence, stale) for rank, stale in _behind(node, op, str(error), log)]
        for slot, raw in saved_slots(node):
            try:
                slot_value(node, slot)
            except RuntimeError as stale:
                if _VERSIONS.search(str(stale)):
                    tensor = _stale_tensor(node, slot, raw, str(stale), op, log)
                    found.append((str(stale) == str(error), node._sequence_nr(), tensor))
    if not any(raised for raised, _, _ in found):
        found += hidden
    found.sort(key=lambda entry: entry[:2], reverse=True)
    return tuple(tensor for _, _, tensor in found)


def stale_behind(error: BaseException, model: nn.Module) -> tuple[StaleTensor, ...]:
    """All stale tensors of the graph on which backward raised ``error``, of a step that was neither watched nor
    replayed: which of them are parameters or buffers of ``model`` is known, the lines are not."""
    log = GraphLog()
    with torch._C.DisableTorchFunction():
        log.name(unwrapped(model))
        return stale_tensors(error, log)


def _roots(error: BaseException) -> tuple[torch.Tensor, ...]:
    """The tensors that the innermost failing backward pass started from."""
    roots: tuple[torch.Tensor, ...] = ()
    traceback = error.__traceback__
    while traceback is not None:
        frame: FrameType = traceback.tb_frame
        if frame.f_code.co_name == "_engine_run_backward":
            roots = tuple(t for t in frame.f_locals.get("t_outputs", ()) if isinstance(t, torch.Tensor))
        traceback = traceback.tb_next
    return roots


def _stale_tensor(node: Any, slot: str, raw: Any, message: str, op: GraphOp | None, log: GraphLog) -> StaleTensor:
    saved, found = _versions(message)
    shape = _shape(message)
    candidates = [_identity(saved_tensor, message) for saved_tensor in (raw if isinstance(raw, tuple) else (raw,))]
    identity = next((c for c in candidates if c and c[1] == found and shape in (None, c[2])), None)
    if identity is None and op is not None:
        # A leaf that the write made part of a graph reaches no hook.
        written = _written(log, op, saved, found)
        key, writes = next(iter(written.items())) if len(written) == 1 else (None, [])
        dtype = dtype_name(writes[0].dtype) if writes else ""
    else:
        key, _, shape, dtype = identity or (None, found, shape, "")
        writes = _counted(log, key, op, saved, found)
    name = "saved_tensors" if slot == "tensors" else slot
    return log.told(op, node, name, key, dtype, shape or (), writes, versions=(saved, found))


def _identity(saved: Any, message: str) -> tuple[int, int, tuple[int, ...], str] | None:
    """Storage, version, shape and dtype of a stale saved tensor.

    PyTorch gives a stale tensor only to hooks. The slot behaves as before: unpacking it raises the same error.
    """
    seen: list[tuple[int, int, tuple[int, ...], str]] = []

    def pack(tensor: torch.Tensor) -> None:
        seen.append((tensor.untyped_storage()._cdata, tensor._version, tuple(tensor.shape), dtype_name(tensor.dtype)))

    def unpack(_: None) -> torch.Tensor:
        raise RuntimeError(message)

    try:
        saved.register_hooks(pack, unpack)
    except RuntimeError:
        # It has hooks already: those of a replay that ran into the same graph, where PyTorch shows them.
        return getattr(getattr(saved, "unpack_hook", None), "identity", None)
    unpack.identity = seen[0] if seen else None  # type: ignore[attr-defined]
    return seen[0] if seen else None


def _behind(node: Any, op: GraphOp, message: str, log: GraphLog) -> Iterator[tuple[int, StaleTensor]]:
    """The stale tensors of the node that an in-place op on a view hides, with their ranks.

    These are the storages the op used that were written since as often as the message says. First come those whose op
    made what the message names, then those of the shape it gives, then those written after the op.
    """
    if not _VERSIONS.search(message):
        return
    saved, found = _versions(message)
    for key, writes in _written(log, op, saved, found).items():
        dtype = dtype_name(writes[0].dtype)
        stale = log.told(op, node, None, key, dtype, _shape(message) or (), writes, versions=(saved, found))
        own = [write for write in log.writes(key, op.event - 1) if write.event == op.event]
        fits = any(write.layout[1] == _shape(message) for write in own)
        made = _NODE.search(message)
        named = made is not None and made[1].lower() == op_name(op.func).rpartition("::")[2].strip("_").replace("_", "")
        yield 4 * named + 2 * fits + any(write.event > op.event for write in writes), stale


def _written(log: GraphLog, op: GraphOp, saved: int, found: int) -> dict[int, list[Overwrite]]:
    """The storages that ``op`` used and that went from version ``saved`` to ``found``, with their writes."""
    counted = {key: _counted(log, key, op, saved, found) for key in op.keys}
    written = {
        key: writes
        for key, writes in counted.items()
        if any(write.version == saved for write in writes) and any(write.after == found for write in writes)
    }
    # The op's own write made the tensor stale only if nothing was written later.
    later = {key: writes for key, writes in written.items() if any(write.event > op.event for write in writes)}
    return later or written


def _versions(message: str) -> tuple[int, int]:
    """The saved and the found version, from a message that names both."""
    match = _VERSIONS.search(message)
    assert match is not None
    return int(match[2]), int(match[1])


def _shape(message: str) -> tuple[int, ...] | None:
    match = _SHAPE.search(message)
    return tuple(int(n) for n in match[1].split(",") if n.strip()) if match else None


def _counted(log: GraphLog, key: int | None, op: GraphOp | None, saved: int, found: int) -> list[Overwrite]:
    """The writes that took a tensor from version ``saved`` to ``found``."""
    # `x.mul_(x)` saves the tensor that it writes to.
    writes = log.writes(key, op.event - 1 if op else 0)
    return [write for write in writes if write.version is not None and saved <= write.version < found]
