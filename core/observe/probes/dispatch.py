"""Every op of a replayed step: which made a node of the graph, and which wrote to memory that a node uses."""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ampcheck.observe.autograd import active_hooks
from ampcheck.observe.probes.aliases import data_property, method_listened_to
from ampcheck.observe.probes.call_sites import CallSite, CallSites
from ampcheck.observe.probes.containment import bare, contained, own_frame_hidden
from ampcheck.observe.probes.graph_log import Derived, GraphLog, GraphOp, Overwrite, op_name
from ampcheck.observe.probes.known_ops import KnownOp, counting_versions, known_op, write_targets
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone, put_on, taken_off, tracing
from ampcheck.observe.probes.reads import BackwardReads
from ampcheck.observe.tensors import PLAIN, operands_in, same_values, storage_key
from ampcheck.observe.walk import unwrapped

_AUTOGRAD: Any = torch._C._autograd
_sequence_nr: Callable[[], int] = _AUTOGRAD._get_sequence_nr
_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_CLONE: Any = torch.ops.aten.clone.default
_PACKING = frozenset(
    getattr(torch.ops.aten, name).default for name in ("clone", "detach", "alias", "_to_copy", "copy_", "lift_fresh")
)
_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
_inference_mode: Callable[[], bool] = torch.is_inference_mode_enabled

Compared = tuple[Overwrite, torch.Tensor, torch.Tensor]
Observed = tuple[GraphOp | None, Sequence[Compared]]


class Given(NamedTuple):
    """An argument of an op that runs outside the mode, as it was before.

    ``before`` is a copy of it, if PyTorch may not notice a write to it.
    """

    tensor: torch.Tensor
    version: int
    before: torch.Tensor | None


class _Stepping(NamedTuple):
    """An optimizer step in progress: the parameters that nodes have used, with their versions and a few elements.

    ``blind``: the probe is off the mode stack meanwhile.
    """

    optimizer: torch.optim.Optimizer
    call_site: CallSite
    parameters: list[tuple[torch.Tensor, int, torch.Tensor | None]]
    blind: bool


class DispatchProbe(TorchDispatchMode):
    """Logs the ops of a step, in the thread that entered it and in the backward passes that this thread starts:

    - each op that makes an autograd node: call, module, the storages it saw,
    - each write (known by the op's schema, or an assignment to ``data``): op, call, module, the target's version,
    - each saved tensor that backward reads although it was overwritten after the save. PyTorch's own check stays in
      force but missed it: the write bypassed the version counter, or saved-tensor hooks are in the way.

    Only for a step that is replayed and thrown away: under a mode some ops compute different bits. The mode sits at the
    bottom of the stack of dispatch modes, so that it can be entered and left at any time, whatever ``with`` blocks of
    others begin and end in between.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled under this mode, and guarding against it would cost as much as the mode.
        return False

    def __init__(
        self, model: nn.Module, current_module: Callable[[], str | None], changed: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error: Exception | None = None
        self.log = GraphLog()
        self._current_module = current_module
        self._changed = changed
        self._call_sites = CallSites()
        self._reads = BackwardReads(self.log, self._call_sites, current_module)
        self._known: dict[int, KnownOp] = {}
        self._event = 0
        self._sequences: dict[int, int] = {}
        self._latest: dict[int, GraphOp] = {}
        self._task = -1
        self._hooked = False
        self._packed = False
        self._stepping: _Stepping | None = None
        self._handles: list[Any] = []
        self._listening = Listening()
        _allow_higher_order_ops()
        with torch._C.DisableTorchFunction():
            self.log.name(unwrapped(model))

    def __enter__(self) -> DispatchProbe:
        self._thread = threading.get_ident()
        self._sequences[self._thread] = _sequence_nr()
        self._handles = [register_optimizer_step_pre_hook(self._before_step)]
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        self._listening.to_attribute(torch.Tensor, "data", data_property, (None, self._assigns))
        self._listening.to_attribute(torch.Tensor, "numpy", method_listened_to, self._exported)
        self._push()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._listening.end()
        self._stepping = None
        self._pop()

    def _push(self) -> None:
        others = taken_off(None)
        torch._C._push_on_torch_dispatch_stack(self)
        put_on(others)

    def _pop(self) -> None:
        put_on(taken_off(self))

    def step_aside(self) -> bool:
        """Leave the stack of modes for a while; false if the probe is not on it."""
        depth = torch._C._len_torch_dispatch_stack()
        active = any(torch._C._get_dispatch_stack_at(index) is self for index in range(depth))
        if active:
            self._pop()
        return active

    @contained
    def step_back(self) -> None:
        self._push()

    def given(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Given]:
        """The arguments of an op that is about to run outside the mode."""
        overloads: Sequence[str] = func.overloads() if isinstance(func, torch._ops.OpOverloadPacket) else ()
        targets = write_targets(getattr(func, overloads[0]) if len(overloads) == 1 else func)
        written = (args[position] if position < len(args) else kwargs.get(name) for position, name in targets)
        given: list[Given] = []
        with alone():
            told = {id(tensor) for tensor in operands_in(tuple(written))}
            for tensor in operands_in((*args, *kwargs.values())):
                if type(tensor) not in PLAIN or tensor.is_inference():
                    continue
                unseen = id(tensor) in told and storage_key(tensor) in self.log.users and self._may_pass(tensor)
                given.append(Given(tensor, tensor._version, tensor.detach().clone() if unseen else None))
        return given

    def _may_pass(self, target: torch.Tensor) -> bool:
        """Whether PyTorch's check may miss a write to ``target``."""
        return not target.requires_grad or self._hooked

    @contained
    def log_apart(self, func: Any, given: Sequence[Given], output: Any, frame: FrameType) -> None:
        """Log an op that ran outside the mode, called from ``frame``."""
        values = output if isinstance(output, (tuple, list)) else (output,)
        with alone():
            tensors = [one.tensor for one in given]
            outputs = [tensor for tensor in operands_in(values) if type(tensor) in PLAIN]
            known = KnownOp(op_name(func), (), True)
            call_site = self._call_sites.find(frame)
            if _graph_task() == -1 and _inference_mode():
                self._note_inference(call_site)
            op = self._graph_op(func, known, tensors, frame)
            if op is not None:
                self._used(op, tensors)
                op.taken = len(op.keys)
                self._used(op, outputs, produced=True)
            elif _graph_task() == -1:
                self._derive(func, tensors, outputs, frame)
            self._event += op is None
            for tensor, version, before in given:
                key = storage_key(tensor)
                changed = None if before is None else not same_values(before, tensor)
                if key not in self.log.users or (tensor._version == version and not changed):
                    continue
                write = Overwrite(self._event, known.name, call_site, self._current_module(), tensor)
                write.version, write.after, write.changed = version, tensor._version, changed
                self.log.wrote(key, write)
                if self._may_pass(tensor):
                    self._reads.suspects.add(key)

    @contained
    def _assigns(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Log that ``tensor`` is about to get the memory of ``value``: a node that saved the tensor will read that."""
        if threading.get_ident() != self._thread or type(tensor) not in PLAIN or type(value) not in PLAIN:
            return
        with alone():
            old, new = storage_key(tensor), storage_key(value)
            if old not in self.log.users or old == new or new is None:
                return
            self._event += 1
            call_site = self._call_sites.find(sys._getframe(3))
            write = Overwrite(self._event, "aten::set_data", call_site, self._current_module(), tensor)
            write.after = write.version
            write.changed = tensor.shape != value.shape or tensor.dtype != value.dtype or not same_values(tensor, value)
            self.log.wrote(old, write)
            self.log.pin(new, value)
            self._reads.moved(old, new, write)

    @contained
    def _exported(self, array: Any, tensor: torch.Tensor) -> None:
        """Note the call that shared the memory of ``tensor`` with NumPy."""
        if threading.get_ident() == self._thread and type(tensor) in PLAIN:
            with alone():
                key = storage_key(tensor)
                if key is not None:
                    self.log.shared.setdefault(key, self._call_sites.find(sys._getframe(3)))
                    self.log.pin(key, tensor)

    @contained
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what an optimizer step is about to change, and look away: it makes many ops and few facts."""
        if threading.get_ident() != self._thread or self._stepping is not None:
            return
        # PyTorch's own optimizers count their writes; others may write through `.data`, which a few elements reveal.
        counted = type(optimizer).__module__.startswith("torch.optim")
        self._stepping = _Stepping(
            optimizer,
            self._call_sites.find(sys._getframe(1)),
            [
                (parameter, parameter._version, None if counted else _sample(parameter))
                for group in optimizer.param_groups
                for parameter in group["params"]
                if storage_key(parameter) in self.log.users
            ],
            # A closure runs a whole training step.
            blind=len(args) < 2 and kwargs.get("closure") is None,
        )
        if self._stepping.blind:
            self._pop()

    @contained
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stepping = self._stepping
        if stepping is None or stepping.optimizer is not optimizer:
            return
        self._stepping = None
        if stepping.blind:
            self._push()
        self._event += 1
        for parameter, version, sample in stepping.parameters:
            key = storage_key(parameter)
            write = Overwrite(self._event, f"{type(optimizer).__name__}.step", stepping.call_site, None, parameter)
            write.version, write.after = version, parameter._version
            unseen = sample is not None and not same_values(sample, _sample(parameter))
            if key is not None and (write.after != version or unseen):
                self.log.wrote(key, write)
                if unseen:
                    self._reads.suspects.add(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        observed: Observed | None = None
        counted = True
        try:
            # Traced and fake tensors hold no data, and are not part of the training.
            if not types and not tracing():
                # By id: ops hash slowly, and live as long as the process.
                known = self._known.get(id(func)) or self._learn(func)
                counted = known.counted
                if self.error is None and self._is_of_interest(known):
                    with torch._C.DisableTorchFunction():
                        observed = self._before(func, known, args, kwargs)
        except Exception as error:  # noqa: BLE001 - our fault must not become the training's
            self.error = self.error or bare(error)
        with own_frame_hidden:
            output = func(*args, **kwargs) if counted else counting_versions(func, args, kwargs)
        if observed is not None:
            try:
                with torch._C.DisableTorchFunction():
                    self._after(func, args, output, *observed)
            except Exception as error:  # noqa: BLE001
                self.error = bare(error)
        return output

    def _is_of_interest(self, known: KnownOp) -> bool:
        """Whether to look at an op. Most make no node, write nothing, and run in a backward pass without suspects."""
        task = _graph_task()
        if task != -1:
            if task != self._task:
                return True
            if self._reads.needed and not _grad_enabled():
                return True
        elif _inference_mode():
            return True
        return (
            task == -1
            or bool(known.targets)
            or self._packed
            or _sequence_nr() != self._sequences.get(threading.get_ident())
        )

    def _learn(self, func: Any) -> KnownOp:
        known = self._known[id(func)] = known_op(func)
        return known

    def _before(self, func: Any, known: KnownOp, args: Sequence[Any], kwargs: dict[str, Any]) -> Observed | None:
        frame = sys._getframe(2)
        task = _graph_task()
        if task != -1:
            if task != self._task:
                self._began(task, frame)
            if not _grad_enabled() and self._reads.needed:
                self._reads.check(args, frame)
        elif _inference_mode():
            self._note_inference(self._call_sites.find(frame))
        op = self._graph_op(func, known, args, frame)
        if op is not None:
            self._used(op, args)
            op.taken = len(op.keys)
        compared = self._log_writes(op, known, args, kwargs, frame) if known.targets else ()
        if op is None and not compared and task != -1:
            return None
        return op, compared

    def _note_inference(self, call_site: CallSite) -> None:
        """Record a call under ``inference_mode``, as the latest."""
        self.log.under_inference.pop(call_site, None)
        self.log.under_inference[call_site] = None

    def _began(self, task: int, frame: FrameType | None) -> None:
        """Record that a backward pass begins, and find which memory something outside PyTorch shares by now."""
        self._task = task
        if task in self.log.begun:
            return
        self.log.begun[task] = self._call_sites.find(frame)
        self._reads.backward_begins()

    def _graph_op(self, func: Any, known: KnownOp, args: Sequence[Any], frame: FrameType | None) -> GraphOp | None:
        """The op that autograd is recording, if ``func`` is one or shows which op an earlier record stands for."""
        thread = threading.get_ident()
        sequence = _sequence_nr()
        last = self._sequences.get(thread, sequence - 1)
        if sequence == last:
            made = self._latest.get(thread)
            if made is None or made.sequence != sequence - 1:
                return None
            if made.hooks and made.func in _PACKING and func not in _PACKING:
                # A pack hook's ops on an input come before the op that saves it.
                made.func, made.call_site, made.keys = func, self._call_sites.find(frame), ()
                self._packed = False
                return made
            if (
                known.targets
                and made.func is _CLONE
                and _grad_enabled()
                and made.call_site == self._call_sites.find(frame)
            ):
                # An in-place op that needs the value it overwrites has made its node and saved a copy of the value.
                made.func = func
                return made
            return None
        self._sequences[thread] = sequence
        made = self._latest.get(thread)
        recorded = not _grad_enabled() or any(tensor.requires_grad for tensor in operands_in(args))
        if made is not None and made.on_view and not recorded and not active_hooks():
            # Ops without gradients make no node: the in-place op on a view made these nodes, after its own.
            self.log.ops.update(dict.fromkeys(range(last, sequence), made))
            return None
        self._event += 1
        self._reads.check_unmarked(args, frame)
        hooks = active_hooks()
        if hooks is True and self._call_sites.in_checkpoint(frame):
            hooks = checkpoint
        op = GraphOp(self._event, sequence - 1, func, self._call_sites.find(frame), self._current_module(), hooks)
        self._hooked = self._hooked or bool(hooks)
        self._reads.saved_under(hooks)
        self._packed = bool(hooks) and func in _PACKING
        self.log.made[op.event] = op
        for number in range(last, sequence):
            self.log.ops[number] = op
        self._latest[thread] = op
        return op

    def _log_writes(
        self, op: GraphOp | None, known: KnownOp, args: Sequence[Any], kwargs: dict[str, Any], frame: FrameType | None
    ) -> Sequence[Compared]:
        compared: list[Compared] = []
        call_site = op.call_site if op is not None else None
        self._event += op is None
        for position, name in known.targets:
            for target in operands_in((args[position] if position < len(args) else kwargs.get(name),)):
                # What no node has used cannot be stale.
                key = storage_key(target)
                if key not in self.log.users:
                    continue
                if call_site is None:
                    find = self._call_sites.find_step if key in self.log.names else self._call_sites.find
                    call_site = find(frame)
                if call_site.writer == "parameter-gather":
                    # The memory was freed after forward: gathering restores what was there.
                    return ()
                if op is not None and target._is_view():
                    op.on_view = True
                write = Overwrite(self._event, known.name, call_site, self._current_module(), target)
                self.log.wrote(key, write)
                if call_site.caller is not None and not _grad_enabled():
                    self._reads.written_unmarked(target, write)
                if self._may_pass(target):
                    # A write without effect is no fault: compare the contents.
                    self._reads.suspects.add(key)
                    if op is None:
                        compared.append((write, target, target.detach().clone()))
        return compared

    def _after(
        self, func: Any, args: Sequence[Any], output: Any, op: GraphOp | None, compared: Sequence[Compared]
    ) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        if op is not None:
            self._used(op, outputs, produced=True)
        for write, target, before in compared:
            write.changed = storage_key(target) in self._changed or not same_values(before, target)
        if op is None and _graph_task() == -1:
            self._derive(func, args, outputs, sys._getframe(2))

    def _used(self, op: GraphOp, values: Sequence[Any], *, produced: bool = False) -> None:
        for tensor in operands_in(values):
            key = storage_key(tensor)
            if key is None:
                continue
            users = self.log.users.get(key)
            if users is None:
                users = self.log.users[key] = array("q")
                self.log.pin(key, tensor)
            if op.event not in users[-1:]:
                users.append(op.event)
            if key not in op.keys:
                op.keys += (key,)
            if produced or key in self._reads.suspects or not tensor.untyped_storage().resizable():
                self._reads.note_content(op, tensor, key)

    def _derive(self, func: Any, args: Sequence[Any], outputs: Sequence[Any], frame: FrameType | None) -> None:
        sources = tuple(key for tensor in operands_in(args) if (key := storage_key(tensor)) is not None)
        cut = any(tensor.requires_grad for tensor in operands_in(args))
        call_site = self._call_sites.find(frame)
        for tensor in operands_in(outputs):
            key = storage_key(tensor)
            if key is not None and (key not in sources or key not in self.log.derived or cut):
                self.log.pin(key, tensor)
                self.log.derived[key] = Derived(op_name(func), call_site, self._current_module(), sources, cut)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    row = tensor.detach()
    while row.dim() > 1 and row.shape[0]:
        row = row[0]
    return row[:16].clone() if row.dim() else row.clone()


def _allow_higher_order_ops() -> None:
    """Let higher-order ops pass through the mode. Newer PyTorch asks ``supports_higher_order_operators``."""
    if hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return
    for op in tuple(torch._ops._higher_order_ops.values()):
        if all(DispatchProbe not in getattr(op, table, ()) for table in ("python_key_mode_table", "python_key_table")):
            op.py_impl(DispatchProbe)(_pass_through(op))


def _pass_through(op: Any) -> Callable[..., Any]:
    def call(mode: DispatchProbe, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call
