"""A watched step: the probes around it, and what they saw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import FrameType, TracebackType

import torch
from torch import nn

from ampcheck.observe.probes.aliases import AliasProbe
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import bare, undo
from ampcheck.observe.probes.dispatch import DispatchProbe
from ampcheck.observe.probes.extension_ops import ExtensionOps
from ampcheck.observe.probes.graph import GraphProbe
from ampcheck.observe.probes.losses import LossProbe
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.probes.ranges import RangeProbe
from ampcheck.observe.probes.saved_tensors import graph_trace
from ampcheck.observe.probes.scaler import ScalerProbe
from ampcheck.observe.probes.updates import UpdateProbe
from ampcheck.observe.walk import hooked_modules
from ampcheck.trace import GraphTrace, ModelInfo, Phase, Seen, StepTrace, described

Ended = Callable[["WatchedStep", BaseException | None], None]
Suspected = Callable[["WatchedStep", FrameType], None]
Probe = (
    AliasProbe
    | AutocastProbe
    | ModuleProbe
    | GraphProbe
    | ScalerProbe
    | DispatchProbe
    | LossProbe
    | ExtensionOps
    | UpdateProbe
    | RangeProbe
)


class WatchedStep:
    """The probes around one step of ``model``.

    When they are gone, ``ended`` is called with the step and what its body raised. ``info`` describes the model if it
    is not the attached one, ``entry`` wraps it, ``optimizers`` train it, and ``compiled`` says that parts of either are
    compiled. ``float16``: the step is asked to compute in it. ``autocast`` is a probe that is active already.
    ``suspected`` is called after a backward pass that may have used a stale tensor, with the frame that began the pass;
    from such frames ``batch`` finds what computes the step's loss again.

    ``replayed``: the step runs again and is thrown away, with nothing compiled. What it shows matters more than what it
    costs: each write and each save is logged with its line.
    """

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        device_type: str,
        ended: Ended,
        *,
        info: ModelInfo | None = None,
        autocast: AutocastProbe | None = None,
        suspected: Suspected | None = None,
        batch: Callable[[Iterable[FrameType]], Callable[[], object] | None] | None = None,
        entry: nn.Module | None = None,
        compiled: bool = False,
        float16: bool = False,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        replayed: bool = False,
        changed: frozenset[int] = frozenset(),
    ) -> None:
        self.phase = phase
        self._ended = ended
        self._info = info
        self._stack = ExitStack()
        self._autocast = autocast or AutocastProbe()
        self._modules = modules = ModuleProbe(model, device_type, self._autocast, entry)
        self._aliases: AliasProbe | None = None
        self._graph: GraphProbe | None = None
        self._scaler: ScalerProbe | None = None
        self._dispatch: DispatchProbe | None = None
        if phase == "training":
            notify = None if suspected is None else functools.partial(suspected, self)
            self._aliases = AliasProbe(modules)
            self._graph = GraphProbe(model, device_type, self._autocast, modules, self._aliases, notify)
            self._scaler = ScalerProbe()
        self._updates = UpdateProbe(model, optimizers) if phase == "training" and not replayed else None
        self._ranges: RangeProbe | None = None
        if float16 and self._scaler is not None and not replayed:
            self._ranges = RangeProbe(model, self._scaler.scale)
        self._losses: LossProbe | None = None
        extensions: ExtensionOps | None = None
        if replayed:
            self._dispatch = DispatchProbe(model, lambda: modules.current, changed)
            self._losses = LossProbe()
            extensions = ExtensionOps(self._dispatch)
        optional = (
            self._aliases,
            self._graph,
            self._scaler,
            self._dispatch,
            self._losses,
            extensions,
            self._updates,
            self._ranges,
        )
        self._probes = [self._autocast, modules, *(probe for probe in optional if probe is not None)]
        self._to_enter = [probe for probe in self._probes if probe is not autocast]
        self._complete = not compiled
        self._fault: Exception | None = None
        self._died_of: BaseException | None = None
        self.batch = batch
        self._model = model
        self.replayed: GraphTrace | None = None
        """What a replay showed of the step's graph, if something was suspected."""

    def __enter__(self) -> WatchedStep:
        try:
            for probe in self._to_enter:
                # Registered first, since entering may fail half-way.
                self._stack.callback(self._remove, probe)
                probe.__enter__()
        except Exception as error:  # noqa: BLE001 - reported when the step ends
            self._fault = bare(error)
            self.abandon()
        except BaseException:
            self.abandon()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()
        self._died_of = exc
        self._ended(self, exc)

    def abandon(self) -> None:
        """Remove the probes without calling ``ended``."""
        self._stack.close()

    def _remove(self, probe: Probe) -> None:
        try:
            undo(probe.__exit__, None, None, None)
        except Exception as error:  # noqa: BLE001 - reported when the step ends
            self._fault = self._fault or bare(error)

    @property
    def inside_model(self) -> bool:
        """Whether the running thread is inside a call of the model that began in this step."""
        return self._modules.current is not None

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that the step has used so far."""
        return self._scaler.used if self._scaler is not None else None

    @property
    def changed_parameters(self) -> frozenset[int]:
        """The storages of parameters that were changed past the version counter."""
        return self._aliases.changed_parameters if self._aliases is not None else frozenset()

    @property
    def losses(self) -> tuple[float, ...]:
        """What the backward passes of a replayed step began with."""
        return tuple(self._losses.values) if self._losses is not None else ()

    @property
    def failure(self) -> BaseException | None:
        """What the latest failing backward pass of a replayed step raised, in case it did not come out of the step."""
        return self._graph.failure if self._graph is not None and self._dispatch is not None else None

    def seen(self) -> Seen:
        """What was seen so far. Raises the first error of a probe."""
        return Seen(self.phase, self.trace(), self.graph())

    def trace(self) -> StepTrace:
        """The calls seen so far. Raises the first error of a probe."""
        # Without the losses no remedy can be compared, which is no reason to say nothing else.
        probes = (probe for probe in self._probes if probe is not self._losses)
        for error in (self._fault, *(probe.error for probe in probes)):
            if error is not None:
                raise error
        return StepTrace(
            calls=self._modules.calls,
            regions=tuple(self._autocast.regions),
            cache_cleared=self._autocast.cache_cleared,
            complete=self._complete,
            ops=self._graph.calls if self._graph else (),
            model=self._info,
            scaling=self._scaler.calls if self._scaler else (),
            collapse=self._scaler.collapse if self._scaler else None,
            updates=self._updates.updates if self._updates else (),
            outputs=self._ranges.outputs if self._ranges else {},
            gradients=self._ranges.gradients if self._ranges else None,
            died_of=described(self._died_of) if self._died_of is not None else None,
            called=self._modules.called if self._died_of is not None else {},
        )

    def graph(self, error: BaseException | None = None) -> GraphTrace | None:
        """What was seen of the autograd graph, with the stale tensors behind ``error``; ``None`` if nobody looked.

        Raises the first error of the probe.
        """
        if self._dispatch is not None:
            return graph_trace(self._dispatch, error)
        if self._graph is None or self._aliases is None:
            return None
        if self.replayed is not None:
            return self.replayed
        unchecked, backwards = self._aliases.unchecked, tuple(self._graph.backwards)
        return GraphTrace(unchecked=unchecked, backwards=backwards, hooked=hooked_modules(self._model))
