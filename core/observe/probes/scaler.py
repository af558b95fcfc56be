"""The order in which a step scales, backpropagates, unscales, clips and steps."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import GeneratorType, TracebackType
from typing import Any

import torch

from ampcheck.observe.autograd import leaves_behind, nodes_behind
from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.tensors import tensors_in
from ampcheck.source.lines import calling_site
from ampcheck.trace import Collapse, ScalerCall, Site

_CLIPPING = ("clip_grad_norm_", "clip_grad_value_")
# How many nodes behind a loss its scaling may be: `scaler.scale(a) + scaler.scale(b)`, `scaler.scale(a) / steps`.
_NEAR = 64


@dataclass
class _Event:
    op: str
    site: Site | None
    optimizer: int | None = None
    tensors: frozenset[int] = frozenset()
    scaled: bool | None = None
    skipped: bool | None = None
    unscaled: frozenset[int] = field(default_factory=frozenset)
    factors: frozenset[int] = field(default_factory=frozenset)
    by_hand: bool = False


class ScalerProbe:
    """Records, while it is active, the calls of enabled gradient scalers, of ``backward`` and of gradient clipping.

    It keeps no tensor, only the graph nodes that scaling made.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.used: torch.amp.GradScaler | None = None
        self._events: list[_Event] = []
        self._optimizers: dict[int, tuple[int, frozenset[int]]] = {}
        self._scaled_nodes: list[Any] = []
        self._unscaled: set[int] = set()
        self._stepped: set[int] = set()
        self._scale_was_read = False
        self._finite: list[torch.Tensor] = []
        self._listening = Listening()

    @property
    def calls(self) -> tuple[ScalerCall, ...]:
        """The calls in order; empty if no scaler was at work."""
        if not any(event.op in ("scale", "unscale", "step", "update") for event in self._events):
            return ()
        return tuple(self._call(event) for event in self._events)

    @property
    def collapse(self) -> Collapse | None:
        """How far the loss scale has fallen, if every step so far was skipped; reading it waits for the device."""
        steps = [event.skipped for event in self._events if event.op == "step"]
        scale = self.scale() if steps and all(steps) else None
        return Collapse(scale, any(map(bool, self._finite))) if scale is not None else None

    def scale(self) -> float | None:
        """The loss scale now; reading it waits for the device."""
        scale = getattr(self.used, "_scale", None)
        return float(scale) if isinstance(scale, torch.Tensor) and self.used is not None else None

    def _call(self, event: _Event) -> ScalerCall:
        optimizers = [event.optimizer] if event.optimizer is not None else []
        if event.tensors:
            optimizers = [index for index, held in self._optimizers.values() if held & event.tensors]
        scaled = event.scaled
        if event.op == "clip" and optimizers:
            scaled = bool(event.scaled) and not event.unscaled.intersection(optimizers)
        return ScalerCall(event.op, event.site, tuple(sorted(optimizers)), scaled, event.skipped)

    def __enter__(self) -> ScalerProbe:
        scaler = torch.amp.GradScaler
        listening = self._listening
        listening.to(scaler.scale, after=self._did_scale)
        listening.to(scaler.get_scale, after=self._did_read_scale)
        listening.to(scaler.unscale_, after=self._did_unscale)
        listening.to(scaler.step, before=self._will_step, after=self._did_step)
        listening.to(scaler.update, after=self._did_update)
        listening.to(torch.autograd.backward, before=self._will_go_back)
        listening.to(torch.optim.Optimizer._optimizer_step_code, before=self._did_optimize)
        for name in _CLIPPING:
            listening.to(inspect.unwrap(getattr(torch.nn.utils, name)), before=self._will_clip)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()
        self._scaled_nodes.clear()

    @contained
    def _did_scale(self, result: Any, scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:
        self.used = self.used or scaler
        if scaler.is_enabled():
            self._scaled_nodes += [node for tensor in tensors_in(result) if (node := tensor.grad_fn) is not None]
            self._events.append(_Event("scale", calling_site()))

    @contained
    def _did_read_scale(self, *_: Any) -> None:
        # To divide the gradients by it, or to multiply the clipping norm: both are right.
        self._scale_was_read = True

    @contained
    def _did_unscale(self, result: Any, scaler: torch.amp.GradScaler, optimizer: Any) -> None:
        if scaler.is_enabled():
            self._recognise(scaler)
            index = self._index(optimizer)
            self._unscaled.add(index)
            self._events.append(_Event("unscale", calling_site(), index))

    @contained
    def _will_step(self, scaler: torch.amp.GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self._stepped.clear()

    @contained
    def _did_step(self, result: Any, scaler: torch.amp.GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.used = self.used or scaler
        if not scaler.is_enabled():
            return
        self._recognise(scaler)
        # Fused optimizers are always called, and decide for themselves whether to step.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        skipped = None if fused else not self._stepped
        self._events.append(_Event("step", calling_site(), self._index(optimizer), skipped=skipped))

    @contained
    def _did_update(self, result: Any, scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:
        if scaler.is_enabled():
            self._unscaled.clear()
            self._scale_was_read = False
            self._events.append(_Event("update", calling_site()))

    @contained
    def _did_optimize(self, optimizer: torch.optim.Optimizer) -> None:
        self._stepped.add(id(optimizer))

    @contained
    def _will_go_back(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        with alone():
            self._finite += [torch.isfinite(loss).all() for loss in tensors_in(tensors)]
        if torch._C._current_graph_task_id() != -1 or any(gradient is not None for gradient in _listed(grad_tensors)):
            return
        scaled = any(any(node is one for one in self._scaled_nodes) for node in nodes_behind(tensors, _NEAR))
        leaves = frozenset() if scaled else frozenset(map(id, leaves_behind(tensors)))
        factors = frozenset() if scaled else _factors(tensors)
        self._events.append(_Event("backward", calling_site(), tensors=leaves, scaled=scaled, factors=factors))

    def _recognise(self, scaler: torch.amp.GradScaler) -> None:
        """Recognise a scaled loss by its factor, the scale.

        A watch that began inside ``scaler.scale(model(x))`` did not see that call.
        """
        scale = getattr(scaler, "_scale", None)
        since = self._since_update()
        for index, event in enumerate(since):
            if scale is not None and scale.untyped_storage()._cdata in event.factors:
                event.scaled, event.tensors, event.factors = True, frozenset(), frozenset()
                for later in since[index:]:
                    later.scaled = not later.by_hand if later.op == "clip" else later.scaled

    def _will_clip(self, parameters: Any, *args: Any, **_: Any) -> tuple[Any, ...] | None:
        if not isinstance(parameters, GeneratorType):
            self._clips(parameters)
            return None
        # It can be read only once.
        held = list(parameters)
        self._clips(held)
        return ((parameter for parameter in held), *args)

    @contained
    def _clips(self, parameters: Any) -> None:
        tensors = frozenset(id(tensor) for tensor in _listed(parameters) if isinstance(tensor, torch.Tensor))
        since = self._since_update()
        by_hand = self._scale_was_read
        scaled = not by_hand and any(event.op == "backward" and event.scaled for event in since)
        unscaled = frozenset(self._unscaled)
        self._events.append(
            _Event("clip", calling_site(), tensors=tensors, scaled=scaled, by_hand=by_hand, unscaled=unscaled)
        )

    def _since_update(self) -> list[_Event]:
        last = max((i for i, event in enumerate(self._events) if event.op == "update"), default=-1)
        return self._events[last + 1 :]

    def _index(self, optimizer: Any) -> int:
        held = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        known = self._optimizers.get(id(optimizer))
        index = known[0] if known is not None else len(self._optimizers)
        self._optimizers[id(optimizer)] = index, held
        return index


def _listed(values: Any) -> Iterable[Any]:
    return values if isinstance(values, (list, tuple)) else (values,)


def _factors(tensors: Any) -> frozenset[int]:
    """The storages of the scalars that tensors were multiplied by.

    Skips what was saved under hooks: reading it runs them, and a checkpoint would recompute its forward.
    """
    # Older PyTorch does not show hooks: there the loss itself must be the product.
    near = _NEAR if hasattr(torch._C._autograd.SavedTensor, "unpack_hook") else len(list(tensors_in(tensors)))
    found = set()
    for node in nodes_behind(tensors, near):
        if node.name() in ("Mul", "MulBackward0"):
            # Freed, or written since: then it is not the scale.
            with contextlib.suppress(RuntimeError):
                hooked = getattr(node._raw_saved_other, "unpack_hook", None) is not None
                other = None if hooked else node._saved_other
                if other is not None and other.dim() == 0:
                    found.add(other.untyped_storage()._cdata)
    return frozenset(found)
