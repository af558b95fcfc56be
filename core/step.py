"""A watched step: the probes around it, and what they saw."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

import torch
from torch import nn

from ampcheck.probes.autocast import AutocastProbe
from ampcheck.probes.compiled import CompiledProbe
from ampcheck.probes.containment import bare, undo
from ampcheck.probes.modules import ModuleProbe
from ampcheck.probes.ops import OpProbe
from ampcheck.probes.saved_tensors import graph_trace
from ampcheck.probes.scaler import ScalerProbe
from ampcheck.probes.writes import WriteProbe
from ampcheck.trace import GraphTrace, ModelInfo, Phase, StepTrace, described
from ampcheck.walk import anything_compiled, is_compiled

Ended = Callable[["WatchedStep", BaseException | None], None]
Probe = AutocastProbe | ModuleProbe | CompiledProbe | OpProbe | ScalerProbe | WriteProbe


class WatchedStep:
    """The probes around one step of ``model``; ``ended`` is called with it, and with what the body raised, when they
    are gone. ``entry`` is ``model`` in the wrappers that the loop calls. ``autocast`` is a probe that is active
    already; ``info`` describes a model that is not the attached one. ``replayed``: the step is run again after a
    failure, with nothing compiled, and what it costs matters less than what it shows.
    """

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        entry: nn.Module,
        device_type: str,
        ended: Ended,
        *,
        info: ModelInfo | None = None,
        autocast: AutocastProbe | None = None,
        replayed: bool = False,
    ) -> None:
        self.phase = phase
        self._ended = ended
        self._info = info
        self._stack = ExitStack()
        self._autocast = autocast or AutocastProbe()
        self._modules: ModuleProbe | CompiledProbe
        self._ops: OpProbe | None = None
        self._writes: WriteProbe | None = None
        if is_compiled(entry) and not replayed:
            self._modules = CompiledProbe(entry, device_type, self._autocast)
        else:
            self._modules = modules = ModuleProbe(model, device_type, self._autocast)
            # Active modes send evaluation down other kernels, and make compiled code compile again.
            if phase == "training" and (replayed or not anything_compiled()):
                self._writes = WriteProbe(model, lambda: modules.current)
                self._ops = OpProbe(model, device_type, modules, self._writes)
        self._scaler = ScalerProbe() if phase == "training" else None
        probes = (self._autocast, self._modules, self._ops, self._scaler, self._writes)
        self._probes = [probe for probe in probes if probe is not None]
        self._to_enter = [probe for probe in self._probes if probe is not autocast]
        self._complete = self._ops is not None or phase == "evaluation"
        self._fault: Exception | None = None
        self._died_of: BaseException | None = None

    def __enter__(self) -> WatchedStep:
        try:
            for probe in self._to_enter:
                # Ahead of its entry, which may fail half-way.
                self._stack.callback(self._remove, probe)
                probe.__enter__()
        except Exception as error:  # noqa: BLE001 - told when the step ends
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
        """Remove the probes; nobody is told."""
        self._stack.close()

    def _remove(self, probe: Probe) -> None:
        try:
            undo(probe.__exit__, None, None, None)
        except Exception as error:  # noqa: BLE001 - told when the step ends
            self._fault = self._fault or bare(error)

    def calling(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """The step began inside the call of ``module``, before its forward."""
        if isinstance(self._modules, ModuleProbe):
            self._modules.before(module, args)
        else:
            self._modules.called(module, args)

    def returned(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """The step ends inside the call of ``module``, after its forward."""
        if isinstance(self._modules, ModuleProbe):
            self._modules.after(module, args, output)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that the step used so far."""
        return self._scaler.used if self._scaler is not None else None

    def trace(self) -> StepTrace:
        """What was seen so far. Raises the first error of a probe."""
        for error in (self._fault, *(probe.error for probe in self._probes)):
            if error is not None:
                raise error
        return StepTrace(
            calls=self._modules.calls,
            regions=tuple(self._autocast.regions),
            cache_cleared=self._autocast.cache_cleared,
            complete=self._complete,
            ops=self._ops.calls if self._ops else (),
            model=self._info,
            scaling=self._scaler.calls if self._scaler else (),
            died_of=described(self._died_of) if self._died_of is not None else None,
        )

    def graph(self, error: BaseException | None = None) -> GraphTrace | None:
        """What was seen of the autograd graph, with the stale tensors behind ``error``; ``None``: it was not looked
        at. Raises the first error of the probe."""
        return graph_trace(self._writes, error) if self._writes is not None else None


def merged(earlier: StepTrace | None, step: StepTrace) -> StepTrace:
    """Two watched steps of one phase as one trace."""
    if earlier is None:
        return step
    shift = len(earlier.regions)
    calls = (replace(c, region=None if c.region is None else c.region + shift) for c in step.calls)
    regions = (
        replace(r, index=r.index + shift, outer=None if r.outer is None else r.outer + shift) for r in step.regions
    )
    return replace(
        step,
        calls=(*earlier.calls, *calls),
        regions=(*earlier.regions, *regions),
        ops=(*earlier.ops, *step.ops),
        scaling=(*earlier.scaling, *step.scaling),
        steps=earlier.steps + step.steps,
        cache_cleared=earlier.cache_cleared or step.cache_cleared,
    )
