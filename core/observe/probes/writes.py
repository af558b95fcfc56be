"""What was written in place, what the autograd graph had saved before, and where backward meets both."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ampcheck.observe.autograd import active_hooks, saved_slots, slot_value
from ampcheck.observe.probes.aliases import data_property
from ampcheck.observe.probes.containment import bare, contained, hide_frame
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.log import (
    Derived,
    GraphLog,
    GraphOp,
    Hooks,
    Overwrite,
    layout_of,
    op_name,
    storage_key,
    tensors_among,
)
from ampcheck.observe.probes.modes import alone, put_on, taken_off, tracing
from ampcheck.observe.probes.places import Place, Places
from ampcheck.observe.walk import dtype_name, hooked_modules, plain_name, unwrapped
from ampcheck.source.lines import qualified_name
from ampcheck.trace import Silent, StaleTensor, UncheckedSave

_AUTOGRAD: Any = torch._C._autograd
_sequence_nr: Callable[[], int] = _AUTOGRAD._get_sequence_nr
_graph_task: Callable[[], int] = torch._C._current_graph_task_id
_current_node: Callable[[], Any] = torch._C._current_autograd_node
_CLONE: Any = torch.ops.aten.clone.default
_PACKING = frozenset(
    getattr(torch.ops.aten, name).default for name in ("clone", "detach", "alias", "_to_copy", "copy_", "lift_fresh")
)
_grad_enabled: Callable[[], bool] = torch.is_grad_enabled

_inference_mode: Callable[[], bool] = torch.is_inference_mode_enabled

_PLAIN = frozenset({torch.Tensor, nn.Parameter})

Compared = tuple["Overwrite", torch.Tensor, torch.Tensor]
Observed = tuple["GraphOp | None", Sequence[Compared]]


class _Known(NamedTuple):
    """An op: the positions and names of the arguments it writes to, and whether it counts their versions itself."""

    name: str
    targets: tuple[tuple[int, str], ...]
    counted: bool


class _Given(NamedTuple):
    """An argument of a function that is called apart, as it was before; ``before`` where a write may pass unseen."""

    tensor: torch.Tensor
    version: int
    before: torch.Tensor | None


class _Stepping(NamedTuple):
    """An optimizer step under way: the parameters that nodes have used, with their versions and a few elements.
    ``blind``: the probe does not look."""

    optimizer: torch.optim.Optimizer
    place: Place
    parameters: list[tuple[torch.Tensor, int, torch.Tensor | None]]
    blind: bool


class WriteProbe(TorchDispatchMode):
    """Fills a log, in the thread that entered it and in the backward passes that this thread starts, with

    - each op that makes an autograd node: call, module, the storages it saw,
    - each write (told by the op's schema, or by the assignment of ``data``): op, call, module, the target's version,
    - each saved tensor that backward reads although it was overwritten after the save. PyTorch's own check, which
      stays in force, has passed it: the write went past the version counter, or saved-tensor hooks are in the way.

    For a step that is run again and thrown away: below a mode some ops compute other bits. The mode lies at the bottom
    of the stack of dispatch modes, so that it can be entered and left at any two moments, whatever ``with`` blocks of
    others begin and end in between.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled where this mode is entered, and the guard against it costs as much as the mode.
        return False

    def __init__(self, model: nn.Module, current_module: Callable[[], str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error: Exception | None = None
        self.log = GraphLog()
        self._current_module = current_module
        self._places = Places()
        self._known: dict[int, _Known] = {}
        self._event = 0
        self._sequences: dict[int, int] = {}
        self._latest: dict[int, GraphOp] = {}
        self._suspects: set[int] = set()
        self._shared: set[int] = set()
        self._task = -1
        self._hooked = False
        self._foreign_hooks = False
        self._packed = False
        self._unmarked: list[tuple[weakref.ref[torch.Tensor], int, Overwrite]] = []
        self._contents: dict[tuple[int, ...], float] = {}
        self._stepping: _Stepping | None = None
        self._handles: list[Any] = []
        self._listening = Listening()
        self._moved: dict[int, tuple[int, Overwrite]] = {}
        _allow_higher_order_ops()
        with torch._C.DisableTorchFunction():
            self._name(unwrapped(model))

    def _name(self, model: nn.Module) -> None:
        self.log.hooked = hooked_modules(model)
        for buffer, tensors in ((True, model.named_buffers()), (False, model.named_parameters())):
            for name, tensor in tensors:
                key = storage_key(tensor)
                if key is not None:
                    self.log.names[key] = (plain_name(name), buffer)

    def __enter__(self) -> WriteProbe:
        self._thread = threading.get_ident()
        self._sequences[self._thread] = _sequence_nr()
        self._handles = [register_optimizer_step_pre_hook(self._before_step)]
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        self._listening.to_attribute(torch.Tensor, "data", data_property, (None, self._assigns))
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

    def apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that would compute something else below a dispatch mode; it is logged as one op."""
        given: list[_Given] = []
        aside = False
        try:
            if not tracing():
                self._note(func, args, kwargs, given)
                aside = self._step_aside()
        except Exception as error:  # noqa: BLE001 - a fault of ours is not the training's
            self.error = self.error or bare(error)
        try:
            output = func(*args, **kwargs)
        except BaseException as error:
            hide_frame(error)
            raise
        finally:
            if aside:
                self._step_back()
        if aside:
            self._log_apart(func, given, output)
        return output

    def _step_aside(self) -> bool:
        depth = torch._C._len_torch_dispatch_stack()
        active = any(torch._C._get_dispatch_stack_at(index) is self for index in range(depth))
        if active:
            self._pop()
        return active

    @contained
    def _step_back(self) -> None:
        self._push()

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[_Given]) -> None:
        overloads: Sequence[str] = func.overloads() if isinstance(func, torch._ops.OpOverloadPacket) else ()
        targets = _write_targets(getattr(func, overloads[0]) if len(overloads) == 1 else func)
        written = (args[position] if position < len(args) else kwargs.get(name) for position, name in targets)
        with alone():
            told = {id(tensor) for tensor in tensors_among(tuple(written))}
            for tensor in tensors_among((*args, *kwargs.values())):
                if type(tensor) not in _PLAIN or tensor.is_inference():
                    continue
                unseen = id(tensor) in told and storage_key(tensor) in self.log.users and self._may_pass(tensor)
                given.append(_Given(tensor, tensor._version, tensor.detach().clone() if unseen else None))

    def _may_pass(self, target: torch.Tensor) -> bool:
        """Whether PyTorch's check may not see a write to ``target``."""
        return not target.requires_grad or self._hooked

    @contained
    def _log_apart(self, func: Any, given: list[_Given], output: Any) -> None:
        frame = sys._getframe(3)
        values = output if isinstance(output, (tuple, list)) else (output,)
        with alone():
            tensors = [one.tensor for one in given]
            outputs = [tensor for tensor in tensors_among(values) if type(tensor) in _PLAIN]
            known = _Known(op_name(func), (), True)
            place = self._places.find(frame)
            if _graph_task() == -1 and _inference_mode():
                self._note_inference(place)
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
                changed = None if before is None else not _same(before, tensor)
                if key not in self.log.users or (tensor._version == version and not changed):
                    continue
                write = Overwrite(self._event, known.name, place, self._current_module(), tensor)
                write.version, write.after, write.changed = version, tensor._version, changed
                self.log.wrote(key, write)
                if self._may_pass(tensor):
                    self._suspects.add(key)

    @contained
    def _assigns(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """``tensor`` is about to be given the memory of ``value``: whoever saved it gets that."""
        if threading.get_ident() != self._thread or type(tensor) not in _PLAIN or type(value) not in _PLAIN:
            return
        with alone():
            old, new = storage_key(tensor), storage_key(value)
            if old not in self.log.users or old == new or new is None:
                return
            self._event += 1
            place = self._places.find(sys._getframe(3))
            write = Overwrite(self._event, "aten::set_data", place, self._current_module(), tensor)
            write.after = write.version
            write.changed = tensor.shape != value.shape or tensor.dtype != value.dtype or not _same(tensor, value)
            self.log.wrote(old, write)
            self.log.pin(new, value)
            self._moved[new] = old, write
            self._suspects |= {old, new}

    @contained
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An optimizer step makes many ops and few facts: note what it is about to change, and look away."""
        if threading.get_ident() != self._thread or self._stepping is not None:
            return
        # PyTorch's own optimizers count their writes; others may write through `.data`, where a few elements tell.
        counted = type(optimizer).__module__.startswith("torch.optim")
        self._stepping = _Stepping(
            optimizer,
            self._places.find(sys._getframe(1)),
            [
                (parameter, parameter._version, None if counted else _sample(parameter))
                for group in optimizer.param_groups
                for parameter in group["params"]
                if storage_key(parameter) in self.log.users
            ],
            # A closure is a whole training step.
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
            write = Overwrite(self._event, f"{type(optimizer).__name__}.step", stepping.place, None, parameter)
            write.version, write.after = version, parameter._version
            unseen = sample is not None and not _same(sample, _sample(parameter))
            if key is not None and (write.after != version or unseen):
                self.log.wrote(key, write)
                if unseen:
                    self._suspects.add(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        observed: Observed | None = None
        counted = True
        try:
            # What is traced or faked has no content, and is no part of the training.
            if not types and not tracing():
                # Ops hash slowly, and live as long as the process.
                known = self._known.get(id(func)) or self._learn(func)
                counted = known.counted
                if self.error is None and self._is_of_interest(known):
                    with torch._C.DisableTorchFunction():
                        observed = self._before(func, known, args, kwargs)
        except Exception as error:  # noqa: BLE001 - a fault of ours is not the training's
            self.error = self.error or bare(error)
        try:
            output = func(*args, **kwargs) if counted else _counting(func, args, kwargs)
        except BaseException as error:
            hide_frame(error)
            raise
        if observed is not None:
            try:
                with torch._C.DisableTorchFunction():
                    self._after(func, args, output, *observed)
            except Exception as error:  # noqa: BLE001
                self.error = bare(error)
        return output

    def _is_of_interest(self, known: _Known) -> bool:
        """Most ops are not: they make no node, write to nothing, and run in a backward pass without suspects."""
        task = _graph_task()
        if task != -1:
            if task != self._task:
                return True
            if (self._suspects or self._shared or self._foreign_hooks) and not _grad_enabled():
                return True
        elif _inference_mode():
            return True
        return (
            task == -1
            or bool(known.targets)
            or self._packed
            or _sequence_nr() != self._sequences.get(threading.get_ident())
        )

    def _learn(self, func: Any) -> _Known:
        targets = _write_targets(func)
        counted = not targets or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "ADInplaceOrView")
        known = self._known[id(func)] = _Known(op_name(func), targets, counted)
        return known

    def _before(self, func: Any, known: _Known, args: Sequence[Any], kwargs: dict[str, Any]) -> Observed | None:
        frame = sys._getframe(2)
        task = _graph_task()
        if task != -1:
            if task != self._task:
                self._began(task, frame)
            if not _grad_enabled() and (self._suspects or self._shared or self._foreign_hooks):
                self._check_use(args)
        elif _inference_mode():
            self._note_inference(self._places.find(frame))
        op = self._graph_op(func, known, args, frame)
        if op is not None:
            self._used(op, args)
            op.taken = len(op.keys)
        compared = self._log_writes(op, known, args, kwargs, frame) if known.targets else ()
        if op is None and not compared and task != -1:
            return None
        return op, compared

    def _note_inference(self, place: Place) -> None:
        """A call under ``inference_mode``, as the latest."""
        self.log.under_inference.pop(place, None)
        self.log.under_inference[place] = None

    def _began(self, task: int, frame: FrameType | None) -> None:
        """A backward pass begins: what of the memory that ops used does something outside PyTorch share by now?"""
        self._task = task
        if task in self.log.begun:
            return
        self.log.begun[task] = self._places.find(frame)
        storage: Any = torch.UntypedStorage
        for key in {key for _, key, *_ in self._contents}:
            # Memory that NumPy shares can no longer be resized.
            alive = storage._new_with_weak_ptr(self.log.pinned[key])
            if alive is not None and not alive.resizable():
                self._shared.add(key)

    def _graph_op(self, func: Any, known: _Known, args: Sequence[Any], frame: FrameType | None) -> GraphOp | None:
        """The op that is being recorded by autograd, where this is one, or where this shows which one it is."""
        thread = threading.get_ident()
        sequence = _sequence_nr()
        last = self._sequences.get(thread, sequence - 1)
        if sequence == last:
            made = self._latest.get(thread)
            if made is None or made.sequence != sequence - 1:
                return None
            if made.hooks and made.func in _PACKING and func not in _PACKING:
                # What a pack hook does to an input comes before the op that saves it.
                made.func, made.place, made.keys = func, self._places.find(frame), ()
                self._packed = False
                return made
            if known.targets and made.func is _CLONE and _grad_enabled() and made.place == self._places.find(frame):
                # An in-place op that needs the value it overwrites has made its node, and saved a copy of it.
                made.func = func
                return made
            return None
        self._sequences[thread] = sequence
        made = self._latest.get(thread)
        recorded = not _grad_enabled() or any(tensor.requires_grad for tensor in tensors_among(args))
        if made is not None and made.on_view and not recorded and not active_hooks():
            # An op on what needs no gradient makes no node: the in-place op on a view made these, after its own.
            self.log.ops.update(dict.fromkeys(range(last, sequence), made))
            return None
        self._event += 1
        if self._unmarked:
            self._check_unmarked(args, frame)
        hooks = active_hooks()
        if hooks is True and self._places.in_checkpoint(frame):
            hooks = checkpoint
        op = GraphOp(self._event, sequence - 1, func, self._places.find(frame), self._current_module(), hooks)
        self._hooked = self._hooked or bool(hooks)
        self._foreign_hooks = self._foreign_hooks or _is_foreign(hooks)
        self._packed = bool(hooks) and func in _PACKING
        self.log.made[op.event] = op
        for number in range(last, sequence):
            self.log.ops[number] = op
        self._latest[thread] = op
        return op

    def _log_writes(
        self, op: GraphOp | None, known: _Known, args: Sequence[Any], kwargs: dict[str, Any], frame: FrameType | None
    ) -> Sequence[Compared]:
        compared: list[Compared] = []
        place = op.place if op is not None else None
        self._event += op is None
        for position, name in known.targets:
            for target in tensors_among((args[position] if position < len(args) else kwargs.get(name),)):
                # What no node has used cannot be stale.
                key = storage_key(target)
                if key not in self.log.users:
                    continue
                if place is None:
                    find = self._places.find_step if key in self.log.names else self._places.find
                    place = find(frame)
                if place.writer == "parameter-gather":
                    # The memory was given back after forward: what is gathered into it again is what was there.
                    return ()
                if op is not None and target._is_view():
                    op.on_view = True
                write = Overwrite(self._event, known.name, place, self._current_module(), target)
                self.log.wrote(key, write)
                if place.caller is not None and not _grad_enabled():
                    base = target if target._base is None else target._base
                    if base.grad_fn is not None:
                        self._unmarked.append((weakref.ref(base), base.grad_fn._sequence_nr(), write))
                if self._may_pass(target):
                    # A write without effect is no fault: see what it does.
                    self._suspects.add(key)
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
            write.changed = not _same(before, target)
        if op is None and _graph_task() == -1:
            self._derive(func, args, outputs, sys._getframe(2))

    def _used(self, op: GraphOp, values: Sequence[Any], *, produced: bool = False) -> None:
        for tensor in tensors_among(values):
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
            if produced or key in self._suspects or not tensor.untyped_storage().resizable():
                self._note_content(op, tensor, key)

    def _check_use(self, args: Sequence[Any], node: Any = None) -> None:
        """Backward reads ``args`` (in ``node``, or in the one that runs): is one of them a saved tensor whose content
        is no longer what was saved?"""
        for tensor in tensors_among(args):
            key = storage_key(tensor)
            if key in self._moved:
                self._check_moved(tensor, *self._moved[key], node or _current_node())
            if key not in self.log.users:
                continue
            shared = key in self._shared
            if not (shared or key in self._suspects or self._foreign_hooks):
                continue
            node = node or _current_node()
            op = self.log.op_of(node) if node is not None else None
            if op is None:
                continue
            alias = key in op.keys
            if not alias:
                # A checkpoint computed it anew: the op that saved it is the same op, run again.
                users = (self.log.made[event] for event in self.log.users[key] if event > op.event)
                again = [user for user in users if user.func is op.func and user.module in (None, op.module)]
                if not _keeps_results(op, node):
                    # The recomputation ends before the last op whose tensors are needed: another op made this one.
                    again = [user for user in again if key in user.keys[: user.taken]]
                if not again or not op.hooks:
                    continue
                op = again[-1]
            stale = [
                write
                for write in self.log.writes(key, op.event)
                if write.changed is not False and _overlap(write, tensor)
            ]
            unchecked = alias and _is_foreign(op.hooks)
            outside = shared and not stale and self._content_differs(op, key, tensor)
            if not (stale or unchecked or outside) or self._places.in_recomputation(sys._getframe(3)):
                continue
            if (stale or outside) and (op.event, key) not in self.log.stale:
                silent: Silent = "outside" if outside else "hooks" if op.hooks else "untracked"
                slot = None if op.hooks else slot_of(node, key)
                dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
                self.log.stale[op.event, key] = self.log.told(op, node, slot, key, dtype, shape, stale, silent=silent)
            if unchecked:
                self.log.unchecked.setdefault(op.hooks, _unchecked(op, node))

    def _check_moved(self, tensor: torch.Tensor, old: int, write: Overwrite, node: Any) -> None:
        """Backward reads memory that was assigned to a tensor after a node had saved what it had before."""
        op = self.log.op_of(node) if node is not None else None
        if op is None or op.event > write.event or old not in op.keys or not write.changed or op.hooks:
            return
        if (op.event, old) not in self.log.stale:
            slot = slot_of(node, storage_key(tensor) or 0)
            dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
            stale = self.log.told(op, node, slot, old, dtype, shape, [write], silent="untracked")
            self.log.stale[op.event, old] = stale

    def _note_content(self, op: GraphOp, tensor: torch.Tensor, key: int) -> None:
        """A number that tells contents apart, for memory that may be written to from outside PyTorch. Parameters and
        buffers are left out: other processes may train them too, and batch norm updates its own."""
        if (
            tensor.is_cpu
            and tensor.is_floating_point()
            and tensor.layout is torch.strided
            and key not in self.log.names
        ):
            layout, total = _content(tensor)
            self._contents[(op.event, key, *layout)] = total

    def _content_differs(self, op: GraphOp, key: int, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is another than when ``op`` saw it, though nothing in PyTorch wrote to it."""
        layout, total = _content(tensor)
        written = max((write.event for write in self.log.written.get(key, ()) if write.event <= op.event), default=0)
        events = (event for event in reversed(self.log.users[key]) if written <= event <= op.event)
        noted = (self._contents.get((event, key, *layout)) for event in events)
        before = next((number for number in noted if number is not None), math.nan)
        return not math.isnan(before) and total != before

    def _check_unmarked(self, args: Sequence[Any], frame: FrameType | None) -> None:
        """An op is recorded on ``args``: is one of them an input that a custom function wrote to, with its history
        as it was?"""
        for tensor in tensors_among(args):
            for reference, sequence, write in self._unmarked:
                if reference() is not tensor or tensor.grad_fn is None or tensor.grad_fn._sequence_nr() != sequence:
                    continue
                key = (write.event, sequence)
                if key not in self.log.stale:
                    use = self._places.find(frame).site("call", module=self._current_module())
                    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
                    function = _function_name(write.place)
                    writes = (write.told(),)
                    self.log.stale[key] = StaleTensor(
                        function, None, dtype, shape, save=use, writes=writes, silent="unmarked"
                    )

    def _derive(self, func: Any, args: Sequence[Any], outputs: Sequence[Any], frame: FrameType | None) -> None:
        sources = tuple(key for tensor in tensors_among(args) if (key := storage_key(tensor)) is not None)
        cut = any(tensor.requires_grad for tensor in tensors_among(args))
        place = self._places.find(frame)
        for tensor in tensors_among(outputs):
            key = storage_key(tensor)
            if key is not None and (key not in sources or key not in self.log.derived or cut):
                self.log.pin(key, tensor)
                self.log.derived[key] = Derived(op_name(func), place, self._current_module(), sources, cut)


class ExtensionOps(TorchFunctionMode):
    """Calls the ops of extensions apart from a probe below: their kernels may be PyTorch programs themselves, which
    neither autograd nor autocast would reach there."""

    def __init__(self, probe: WriteProbe) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._probe = probe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, _OPS) and not str(func).startswith(_PYTORCHS_OWN):
            return self._probe.apart(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_PYTORCHS_OWN = ("aten.", "prim.", "prims.", "c10d", "_c10d", "fsdp.", "symm_mem.")


def _keeps_results(op: GraphOp, node: Any) -> bool:
    """Whether a node has saved anything that is not an argument of its op."""
    schema = getattr(op.func, "_schema", None)
    arguments = {argument.name for argument in schema.arguments} if schema is not None else set()
    return any(name not in arguments for name, _ in saved_slots(node))


def slot_of(node: Any, key: int) -> str | None:
    """The slot of a node that holds the storage ``key``."""
    for slot, _ in saved_slots(node):
        try:
            value = slot_value(node, slot)
        except RuntimeError:
            continue
        for tensor in tensors_among((value,)):
            if tensor.untyped_storage()._cdata == key:
                return "saved_tensors" if slot == "tensors" else slot
    return None


def _write_targets(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    # The running statistics that a batch norm writes to are no part of its gradient.
    if schema is None or "batch_norm" in schema.name:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _content(tensor: torch.Tensor) -> tuple[tuple[int, ...], float]:
    """The elements that a tensor takes of its storage, in one tuple of numbers, which costs the garbage collector
    nothing, and their sum in the order they lie there: the same for all its transposes."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim]))
    laid = tensor.permute(order).squeeze() if order else tensor
    return (int(laid.storage_offset()), *laid.shape, *laid.stride()), float(laid.sum())


def _function_name(place: Place) -> str:
    """Of a place in the forward of a custom function, ``Scale.forward``."""
    return qualified_name(place.user[0]) if place.user else "a custom function"


def _is_foreign(hooks: Hooks) -> bool:
    """Whether a hook is known, and not PyTorch's own."""
    return callable(hooks) and not str(getattr(hooks, "__module__", "")).startswith("torch.")


def _unchecked(op: GraphOp, node: Any) -> UncheckedSave:
    code = getattr(op.hooks, "__code__", None)
    hooks = Place((code, 0), None).site("call") if code is not None else None
    return UncheckedSave(node.name(), op.place.site("save", module=op.module, node=node.name()), hooks)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    row = tensor.detach()
    while row.dim() > 1 and row.shape[0]:
        row = row[0]
    return row[:16].clone() if row.dim() else row.clone()


def _same(before: torch.Tensor, after: torch.Tensor) -> bool:
    return bool(((before == after) | ((before != before) & (after != after))).all())


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


def _allow_higher_order_ops() -> None:
    """Let ops that take functions pass through the mode. Newer PyTorch asks ``supports_higher_order_operators``."""
    if hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return
    for op in tuple(torch._ops._higher_order_ops.values()):
        if all(WriteProbe not in getattr(op, table, ()) for table in ("python_key_mode_table", "python_key_table")):
            op.py_impl(WriteProbe)(_pass_through(op))


def _pass_through(op: Any) -> Callable[..., Any]:
    def call(mode: WriteProbe, *args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def _counting(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an op that leaves it to the ops it is made of to count versions (a list op): below a mode they would not."""
    if _inference_mode():
        return func(*args, **kwargs)
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **kwargs)
