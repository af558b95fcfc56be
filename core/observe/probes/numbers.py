"""Every op of a replayed step whose result is not finite, and the way from there to the loss."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import graph as autograd_graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ampcheck.observe.autograd import leaves_behind
from ampcheck.observe.probes.call_sites import CallSite, CallSites
from ampcheck.observe.probes.containment import bare, contained, own_frame_hidden
from ampcheck.observe.probes.graph_log import op_name
from ampcheck.observe.probes.known_ops import KnownOp, known_op
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import put_on, taken_off, tracing
from ampcheck.observe.state import random_state, set_random_state
from ampcheck.observe.tensors import PLAIN, is_readable, operands_in, storage_key
from ampcheck.observe.walk import dtype_name, tensor_names
from ampcheck.source.printable import shown
from ampcheck.trace import Given, Kind, LostConstant, NumericPhase, OperandValues, Origin, PathOp, Root

_sequence_nr: Callable[[], int] = torch._C._autograd._get_sequence_nr
_JUDGED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_LOW = frozenset({torch.float16, torch.bfloat16})
# They write the values they are given: infinities among these are there on purpose.
_FILLS = frozenset({
    "fill", "full", "full_like", "new_full", "masked_fill", "scalar_tensor", "lift_fresh", "lift_fresh_copy",
    "index_fill", "masked_scatter", "where", "tensor", "constant_pad_nd",
})  # fmt: skip
# They write over the whole of their target: what it held is no operand.
_OVERWRITING = frozenset({"fill", "copy", "zero", "normal", "uniform", "random"})
# Their results are memory as it was found.
_UNINITIALISED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
_MOST_SAMPLES, _MOST_PATH, _MOST_TAINT = 16, 24, 12


class _Where:
    """Where an op of the forward pass was called."""

    __slots__ = ("call_site", "module", "op")

    def __init__(self, op: str, call_site: CallSite, module: str | None) -> None:
        self.op, self.call_site, self.module = op, call_site, module


class _Record:
    """An op with a result that is not finite. ``parents`` are its operands that were not finite already, each with the
    record of the op that made it; ``first`` is the index of the earliest record that they come from."""

    __slots__ = (
        "constant", "data", "deliberate", "first", "given", "index", "kind", "made_nan", "name", "node", "operands",
        "outputs", "parents", "phase", "true_value", "where",
    )  # fmt: skip

    def __init__(self, index: int, name: str, where: _Where, phase: NumericPhase, node: str | None) -> None:
        self.index, self.name, self.where, self.phase, self.node = index, name, where, phase, node
        self.first = index
        self.parents: list[tuple[torch.Tensor, _Record | None]] = []
        self.outputs: list[torch.Tensor] = []
        self.operands: tuple[OperandValues, ...] = ()
        self.kind: Kind = "unjudged"
        self.true_value: float | None = None
        self.constant: LostConstant | None = None
        self.given: Given | None = None
        self.made_nan = self.deliberate = self.data = False


class NumberProbe(TorchDispatchMode):
    """Records, in the thread that entered it and in its backward passes, the ops whose results are not finite.

    ``found`` goes back from a loss or gradient that is not finite, along values that are not, to the op whose operands
    were finite. The first such op in time may be another: masks are infinite on purpose, and memory is allocated before
    it is written.

    Reading each value waits for the device: only for a step that is run again and thrown away.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, model: nn.Module, current_module: Callable[[], str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error: Exception | None = None
        self.losses: list[float] = []
        self.bad_gradients: list[str] = []
        self.batch: tuple[int, ...] = ()
        self._current_module = current_module
        self._call_sites = CallSites()
        self._listening = Listening()
        self._thread = threading.get_ident()
        self._known: dict[int, KnownOp] = {}
        self._forward: dict[int, _Where] = {}
        self._sequence = -1
        self._records: list[_Record] = []
        self._by_id: dict[int, _Record] = {}
        self._by_storage: dict[int, _Record] = {}
        self._lost: dict[int, tuple[LostConstant, int]] = {}
        self._alive: list[torch.Tensor] = []
        self._root: tuple[Root, _Record | None, torch.Tensor] | None = None
        self._leaves: list[list[torch.Tensor]] = []
        with torch._C.DisableTorchFunction():
            self._names = tensor_names(model)
            self._own = dict(_storages(model))
            self._buffers = frozenset(shown(name) for name, _ in model.named_buffers())
            self._parameter_names = {id(p): shown(name) for name, p in model.named_parameters()}

    def __enter__(self) -> NumberProbe:
        self._thread, self._sequence = threading.get_ident(), _sequence_nr()
        self._listening.to(autograd_graph._engine_run_backward, before=self._begins, after=self._ended)
        others = taken_off(None)
        torch._C._push_on_torch_dispatch_stack(self)
        put_on(others)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()
        put_on(taken_off(self))

    @property
    def root(self) -> Root | None:
        """What was not finite: ``"loss"``, ``"gradient"``, or ``None``."""
        return self._root[0] if self._root is not None else None

    def found(self, *, anything: bool = False) -> tuple[Origin | None, tuple[PathOp, ...]]:
        """The origin of what was not finite, and the ops from there. ``anything``: if neither a loss nor a gradient
        was, that of the latest value that was not finite and not so on purpose."""
        start: _Record | None = None
        if self._root is not None:
            start = self._root[1]
        elif anything:
            start = next((one for one in reversed(self._records) if not one.deliberate), None)
        if start is None:
            return None, ()
        chain = self._back(start)
        origin = chain[-1]
        path = tuple(
            PathOp(one.where.op, dtype_name(one.outputs[0].dtype), one.where.call_site.site("call"), one.where.module,
                   one.phase)
            for one in reversed(chain[-_MOST_PATH:])
        )  # fmt: skip
        return self._told(origin), path

    def clear(self) -> None:
        """Let go of the values."""
        self._records.clear()
        self._alive.clear()
        self._by_id.clear()
        self._by_storage.clear()
        self._lost.clear()
        self._leaves.clear()
        self._root = None

    @contained
    def _begins(self, roots: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        with _below():
            roots = [root for root in operands_in((roots,)) if root.dtype in _JUDGED]
            self.losses.append(sum(float(root.detach().double().sum()) for root in roots))
            if self._root is None:
                bad = next((root for root in roots if not _finite(root)), None)
                if bad is not None:
                    self._root = "loss", self._producer(bad), bad
            self._leaves.append([leaf for leaf in leaves_behind(roots) if leaf.grad is None or _finite(leaf.grad)])

    @contained
    def _ended(self, result: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1 or not self._leaves:
            return
        leaves = self._leaves.pop()
        with _below():
            gradients = [(None, one) for one in operands_in((result,))] if isinstance(result, tuple) else []
            if not gradients:
                gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]  # type: ignore[misc]
            bad = [(leaf, one) for leaf, one in gradients if one.dtype in _JUDGED and not _finite(one)]
            names = (self._parameter_names.get(id(leaf)) for leaf, _ in bad)
            self.bad_gradients += [name for name in names if name is not None and name not in self.bad_gradients]
            if self._root is None and bad:
                origins = [(record, one) for _, one in bad if (record := self._producer(one)) is not None]
                first = min(origins, key=lambda pair: pair[0].first, default=None)
                self._root = ("gradient", None, bad[0][1]) if first is None else ("gradient", *first)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        looked: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        bad: list[torch.Tensor] = []
        try:
            if self.error is None and not types and not tracing():
                with torch._C.DisableTorchFunction():
                    looked, bad = self._before(func, args, kwargs)
        except Exception as error:  # noqa: BLE001 - our fault must not become the training's
            self.error = self.error or bare(error)
        with own_frame_hidden:
            output = func(*args, **kwargs)
        if looked is not None:
            try:
                with torch._C.DisableTorchFunction():
                    self._after(func, args, kwargs, output, looked, bad)
            except Exception as error:  # noqa: BLE001
                self.error = self.error or bare(error)
        return output

    def _before(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
        """Copies of what the op is about to overwrite, and those of it that are not finite by now."""
        known = self._known.get(id(func))
        if known is None:
            known = self._known[id(func)] = known_op(func)
        sequence = _sequence_nr()
        if sequence != self._sequence:
            frame = sys._getframe(2)
            if not self._is_backward(frame):
                where = _Where(known.name, self._call_sites.find(frame), self._current_module())
                for number in range(self._sequence, sequence):
                    self._forward[number] = where
            self._sequence = sequence
        targets = (args[p] if p < len(args) else kwargs.get(name) for p, name in known.targets)
        written = [one for one in operands_in(tuple(targets)) if one.dtype in _JUDGED and type(one) in PLAIN]
        return [(one, one.detach().clone()) for one in written], [one for one in written if not _finite(one)]

    def _after(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        output: Any,
        looked: list[tuple[torch.Tensor, torch.Tensor]],
        bad_before: list[torch.Tensor],
    ) -> None:
        outputs = [
            one for one in operands_in(output if isinstance(output, (tuple, list)) else (output,)) if _is_judged(one)
        ]
        written = {id(target): before for target, before in looked}
        outputs += [target for target, _ in looked if all(target is not one for one in outputs)]
        bad = [one for one in outputs if not _finite(one)]
        inputs = [one for one in operands_in((*args, *kwargs.values())) if _is_judged(one)]
        name = op_name(func)
        base = name.partition("::")[2].rstrip("_")
        self._follow_constants(base, args, kwargs, inputs, outputs)
        if not bad:
            for target, _ in looked:
                # What was not finite there has been overwritten.
                self._by_id.pop(id(target), None)
                if not target._is_view():
                    self._by_storage.pop(storage_key(target) or 0, None)
            return
        frame = sys._getframe(2)
        record = self._new_record(name, frame)
        bad_inputs = [one for one in inputs if id(one) not in written and not _finite(one)]
        bad_inputs += [] if base in _OVERWRITING else bad_before
        record.outputs = bad
        record.parents = [(one, self._producer(one)) for one in bad_inputs]
        record.made_nan = any(_has_nan(one) for one in bad) and not any(
            _has_nan(written.get(id(one), one)) for one in bad_inputs
        )
        before = functools.partial(_as_before, written)
        nan = any(map(_has_nan, bad))
        if base in _UNINITIALISED:
            record.deliberate = True
        elif not bad_inputs:
            filled = base in _FILLS or any(_is_infinite(one) for one in (*args, *kwargs.values()))
            record.deliberate, record.data = filled and not nan, filled and nan
            if not filled:
                self._judge(record, func, tree_map(before, tuple(args)), tree_map(before, kwargs), inputs, outputs)
        else:
            record.deliberate = not nan and all(
                base in _FILLS if one is None else one.deliberate for _, one in record.parents
            )
            # What the program itself set to NaN is its data.
            unknown = [one for one, made in record.parents if made is None or made.data]
            masks = all(map(_is_mask, unknown)) and all(made is None or made.deliberate for _, made in record.parents)
            if unknown and masks:
                record.deliberate = not nan
                record.kind = "masked" if record.made_nan else record.kind
                given = self._given(unknown[0], frame)
                record.given = given if given.what == "input" else None
            elif unknown and not record.deliberate:
                record.given = self._given(unknown[0], frame)
        record.first = min(
            (one.first for _, one in record.parents if one is not None and not one.data), default=record.index
        )
        record.operands = tuple(_operand(before(one)) for one in inputs[:4])
        self._records.append(record)
        # Alive, so that their ids and storages are not reused.
        self._alive += bad
        for one in bad:
            self._by_id[id(one)] = record
            key = storage_key(one)
            if key is not None:
                self._by_storage[key] = record

    def _new_record(self, name: str, frame: FrameType) -> _Record:
        node: Any = torch._C._current_autograd_node()
        if node is None or not self._is_backward(frame):
            where = _Where(name, self._call_sites.find(frame), self._current_module())
            return _Record(len(self._records), name, where, "forward", None)
        known = self._forward.get(node._sequence_nr())
        inside = self._in_custom_backward(frame)
        if inside is not None:
            where = _Where(name, inside, known.module if known else None)
        else:
            where = known or _Where(name, self._call_sites.find(frame), None)
        return _Record(len(self._records), name, where, "backward", node.name())

    def _is_backward(self, frame: FrameType) -> bool:
        if torch._C._current_graph_task_id() == -1:
            return False
        return not torch.is_grad_enabled() or not self._call_sites.in_recomputation(frame)

    def _in_custom_backward(self, frame: FrameType | None) -> CallSite | None:
        """The user's line inside the backward of a custom function, if one is running."""
        inner: FrameType | None = frame
        while inner is not None and inner.f_code.co_name != "_engine_run_backward":
            site = self._call_sites
            if site.kind(inner.f_code) <= 1:
                return site.find(inner)
            inner = inner.f_back
        return None

    def _judge(
        self,
        record: _Record,
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        """Say why finite operands gave a result that is not: the op alone, in float64."""
        bad = record.outputs[0]
        if func.namespace != "aten":
            return
        kept = random_state()
        try:
            exact = func(*tree_map(_in_float64, args), **tree_map(_in_float64, kwargs))
        except Exception:  # noqa: BLE001 - no kernel for float64, say
            return
        finally:
            set_random_state(kept)
        values = list(operands_in(exact if isinstance(exact, (tuple, list)) else (exact,)))
        value = next((one for one in values if one.shape == bad.shape and one.dtype is torch.float64), None)
        if value is None:
            return
        there = value[~torch.isfinite(bad)]
        if bool(torch.isfinite(there).all()):
            record.kind = "overflow"
            record.true_value = float(there[there.abs().argmax()])
            return
        record.kind = "singular"
        lost = [self._lost[id(one)][0] for one in inputs if id(one) in self._lost]
        if lost:
            record.kind, record.constant = "constant-lost", lost[0]

    def _follow_constants(
        self, base: str, args: Sequence[Any], kwargs: dict[str, Any], inputs: list[torch.Tensor], outputs: Sequence[Any]
    ) -> None:
        """Follow numbers that a dtype rounds away through the values computed from them."""
        found: tuple[LostConstant, int] | None = None
        low = next((one for one in outputs if one.dtype in _LOW), None)
        if low is not None and base not in _FILLS and not base.startswith(("_to_copy", "copy")):
            for value in _scalars((*args, *kwargs.values())):
                becomes = float(torch.tensor(value, dtype=torch.float64).to(low.dtype))
                if becomes != value and becomes in (0.0, 1.0, -1.0):
                    site = self._call_sites.find(sys._getframe(3)).site("call")
                    found = LostConstant(value, becomes, dtype_name(low.dtype), site), 0
                    break
        if found is None:
            near = [self._lost[id(one)] for one in inputs if id(one) in self._lost]
            if near and near[0][1] < _MOST_TAINT:
                found = near[0][0], near[0][1] + 1
        if found is not None:
            for one in outputs:
                self._lost[id(one)] = found
                self._alive.append(one)

    def _producer(self, tensor: torch.Tensor) -> _Record | None:
        record = self._by_id.get(id(tensor))
        return record if record is not None else self._by_storage.get(storage_key(tensor) or 0)

    def _back(self, record: _Record) -> list[_Record]:
        """The records from ``record`` back to the origin; of several origins, to the earliest."""
        chain = [record]
        while (earlier := self._earlier(chain[-1])) is not None:
            chain.append(earlier)
        return chain

    def _earlier(self, record: _Record) -> _Record | None:
        """The operand of a record that leads to the earliest origin, as a record; ``None`` for an origin."""
        known = [one for _, one in record.parents if one is not None and not one.data]
        if not known:
            return None
        if record.made_nan and all(one.deliberate for one in known) and record.given is None:
            record.kind = "masked"
            return None
        return min(known, key=lambda one: (one.deliberate, one.first))

    def _told(self, record: _Record) -> Origin:
        bad = record.outputs[0]
        kind, given = record.kind, record.given
        fill: CallSite | None = None
        if kind == "masked":
            fills = [one for _, one in record.parents if one is not None]
            fill = self._fill(fills[0]).where.call_site if fills else None
        elif given is not None:
            kind = "given"
        elif record.deliberate:
            kind = "masked"
        source = bad
        if kind == "given" and record.parents:
            source = record.parents[0][0]
        where = ~torch.isfinite(source)
        where = where if where.shape else where.reshape(1)
        rows = where.flatten(1).any(1) if where.dim() > 1 else where
        samples = self._samples(rows)
        return Origin(
            op=record.where.op if record.phase == "backward" else record.name,
            kind=kind,
            phase=record.phase,
            dtype=dtype_name(bad.dtype),
            site=record.where.call_site.site("origin", module=record.where.module, op=record.where.op),
            module=record.where.module,
            node=record.node,
            true_value=record.true_value,
            limit=torch.finfo(bad.dtype).max if kind == "overflow" else None,
            count=int(where.sum()),
            size=where.numel(),
            nan=_has_nan(bad),
            operands=record.operands,
            samples=samples,
            given=given,
            fill=fill.site("write") if fill is not None else None,
            constant=record.constant,
        )

    def _samples(self, rows: torch.Tensor) -> tuple[int, ...]:
        """The samples of the batch that rows belong to, which may be several a sample."""
        size = next((one for one in self.batch if one == len(rows)), None)
        size = size or next((one for one in self.batch if one and len(rows) and len(rows) % one == 0), None)
        if size is None:
            return ()
        each = len(rows) // size
        return tuple(dict.fromkeys(row // each for row in rows.nonzero().flatten().tolist()))[:_MOST_SAMPLES]

    def _fill(self, record: _Record) -> _Record:
        while record.parents and record.name.partition("::")[2].rstrip("_") not in _FILLS:
            known = [one for _, one in record.parents if one is not None]
            if not known:
                break
            record = known[0]
        return record

    def _given(self, tensor: torch.Tensor, frame: FrameType) -> Given:
        name = self._names.get(id(tensor)) or self._own.get(storage_key(tensor) or 0)
        if name is not None:
            return Given("buffer" if name in self._buffers else "parameter", name)
        return Given("input", _variable(tensor, frame, self._call_sites))


def _storages(model: nn.Module) -> Iterator[tuple[int, str]]:
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if type(tensor) in PLAIN and (key := storage_key(tensor)) is not None and tensor.numel():
            yield key, shown(name)


def _variable(tensor: torch.Tensor, frame: FrameType | None, call_sites: CallSites) -> str | None:
    """The name under which the user's code holds a tensor, in the outermost function that does."""
    name: str | None = None
    while frame is not None:
        if call_sites.kind(frame.f_code) == 0:
            for variable, value in tuple(frame.f_locals.items()):
                found = _inside(value, tensor, variable)
                if found is not None:
                    name = found
        frame = frame.f_back
    return shown(name) if name is not None else None


def _inside(value: Any, tensor: torch.Tensor, name: str) -> str | None:
    if value is tensor:
        return name
    if isinstance(value, dict):
        return next((f"{name}[{key!r}]" for key, one in value.items() if one is tensor), None)
    if isinstance(value, (list, tuple)) and len(value) < 64:
        return next((f"{name}[{index}]" for index, one in enumerate(value) if one is tensor), None)
    return None


class _below:
    """Look at values below every mode and outside the graph."""

    def __enter__(self) -> None:
        self._modes = taken_off()
        self._guards = (torch._C.DisableTorchFunction(), torch.no_grad())
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *_: Any) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)
        put_on(self._modes)


def _is_judged(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _JUDGED and is_readable(tensor)


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(torch.isnan(tensor.detach()).any())


def _as_before(written: dict[int, torch.Tensor], value: Any) -> Any:
    return written.get(id(value), value)


def _in_float64(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double() if value.dtype is not torch.float64 else value.detach().clone()
    return torch.float64 if isinstance(value, torch.dtype) and value in _JUDGED else value


def _scalars(values: Iterable[Any]) -> Iterator[float]:
    for value in values:
        if isinstance(value, float) and value and math.isfinite(value):
            yield value
        elif isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype in (torch.float32, torch.float64):
            number = float(value)
            if number and math.isfinite(number):
                yield number


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether the only infinities of a tensor are those that masks are made of."""
    values = tensor.detach()
    return not bool((torch.isnan(values) | torch.isposinf(values)).any())


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _operand(tensor: torch.Tensor) -> OperandValues:
    values = tensor.detach()
    finite = values[torch.isfinite(values)]
    return OperandValues(
        dtype_name(tensor.dtype),
        tuple(tensor.shape),
        float(finite.abs().max()) if finite.numel() else None,
        int((values == 0).sum()),
        int((values < 0).sum()),
        values.numel() - finite.numel(),
    )
