"""What a watched step showed: module calls, autocast, loss scaling."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, NamedTuple

from ampcheck.trace.model import ModelInfo
from ampcheck.trace.numbers import Gradients, Updates
from ampcheck.trace.site import Site

Phase = Literal["training", "evaluation"]


class AutocastState(NamedTuple):
    """The state of autocast at one moment, for the model's device type."""

    device_type: str
    enabled: bool
    dtype: str
    cache: bool = True

    def __str__(self) -> str:
        return f"autocast {self.dtype}" if self.enabled else "autocast off"


@dataclass(frozen=True)
class AutocastRegion:
    """An autocast region that was entered. ``requested`` is its ``enabled=`` argument (``None``: the region was made
    before the watch began), ``enabled`` what torch made of it. ``outer`` is the index of the region around it.
    ``by_user`` is false if installed code entered it, even when user code called that. ``left_by`` is the exception
    that left it (see ``described``), raised inside it.
    """

    index: int
    device_type: str
    dtype: str
    enabled: bool
    requested: bool | None
    cache: bool
    site: Site | None
    deprecated: str | None = None
    outer: int | None = None
    by_user: bool = True
    left_by: str | None = None

    def is_for(self, device_type: str) -> bool:
        """Whether the region acts on ``device_type``; ``autocast("cuda:0")`` does on ``"cuda"``."""
        return self.device_type.partition(":")[0] == device_type


@dataclass(frozen=True)
class ModuleCall:
    """Identical calls of one module. ``inputs`` and ``outputs`` are the dtypes of floating-point tensors in order,
    ``region`` is the innermost autocast region around the call (an index into ``StepTrace.regions``). ``module`` is the
    qualified name, or ``None`` for a module outside the model (a loss, say). ``parameters`` are the dtypes of the
    module's own parameters while a sharded model computed with them.
    """

    module: str | None
    type: str
    autocast: AutocastState
    region: int | None
    grad_enabled: bool
    in_backward: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    count: int = 1
    leaf: bool = True
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operand:
    """An input of an op. ``name`` is the qualified name if it is a parameter or buffer, or a view of one."""

    dtype: str
    shape: tuple[int, ...]
    name: str | None = None


@dataclass(frozen=True)
class OpCall:
    """Identical calls of one function that some rule needs (see ``ampcheck.observe.probes.graph``)."""

    op: str
    module: str | None
    autocast: AutocastState
    operands: tuple[Operand, ...]
    outputs: tuple[str, ...]
    site: Site | None
    count: int = 1


@dataclass(frozen=True)
class ScalerCall:
    """A call that matters for loss scaling, in order: ``scale``, ``backward``, ``unscale``, ``clip``, ``step`` or
    ``update``. Calls of a disabled scaler are left out.

    ``optimizers`` numbers the optimizers that it concerns, in the order in which the scaler stepped or unscaled them.
    ``scaled`` means for ``backward`` that the loss was scaled, and for ``clip`` that the gradients were still scaled.
    ``skipped`` means for ``step`` that the scaler skipped the optimizer's step. ``None``: unknown.
    """

    op: str
    site: Site | None
    optimizers: tuple[int, ...] = ()
    scaled: bool | None = None
    skipped: bool | None = None


class Collapse(NamedTuple):
    """A scaler that skipped every step: its ``scale`` by then, and whether any loss was ``finite``."""

    scale: float
    finite: bool


# How two steps merge a fact. A field without one fails as soon as two steps are watched.
_ADDED, _EITHER, _BOTH = {"merge": operator.add}, {"merge": operator.or_}, {"merge": operator.and_}
_LATER = {"merge": lambda earlier, later: later}
_LARGEST = {"merge": lambda one, other: {key: max(one.get(key, 0.0), other.get(key, 0.0)) for key in one | other}}


@dataclass(frozen=True)
class StepTrace:
    """One watched phase. ``model`` is the walk over the evaluated model, if that is another object than the model that
    trains (an averaged or a half-precision copy). ``cache_cleared``: something called ``torch.clear_autocast_cache``
    inside a region. ``complete`` is false if something was compiled, because then only the calls into it were seen.
    ``outputs`` are the largest magnitudes of modules' float16 outputs, by the modules' names. ``called`` is where the
    modules of a step that failed were called."""

    calls: tuple[ModuleCall, ...] = field(default=(), metadata=_ADDED)
    regions: tuple[AutocastRegion, ...] = field(default=(), metadata=_ADDED)
    ops: tuple[OpCall, ...] = field(default=(), metadata=_ADDED)
    steps: int = field(default=1, metadata=_ADDED)
    model: ModelInfo | None = field(default=None, metadata=_LATER)
    cache_cleared: bool = field(default=False, metadata=_EITHER)
    complete: bool = field(default=True, metadata=_BOTH)
    scaling: tuple[ScalerCall, ...] = field(default=(), metadata=_ADDED)
    collapse: Collapse | None = field(default=None, metadata=_LATER)
    updates: tuple[Updates, ...] = field(default=(), metadata=_ADDED)
    outputs: Mapping[str, float] = field(default_factory=dict, metadata=_LARGEST)
    gradients: Gradients | None = field(default=None, metadata=_LATER)
    died_of: str | None = field(default=None, metadata=_LATER)
    called: Mapping[str, Site] = field(default_factory=dict, metadata=_LATER)

    @functools.cached_property
    def forward(self) -> tuple[ModuleCall, ...]:
        """The calls of the forward pass, without those that backward repeats and, if some calls ran with gradients,
        without those that ran without (a teacher, a metric)."""
        calls = tuple(call for call in self.calls if not call.in_backward)
        return tuple(call for call in calls if call.grad_enabled) or calls

    @functools.cached_property
    def in_force(self) -> Counter[str]:
        """Module calls of the forward pass by the autocast dtype they ran under, without calls with autocast off. A
        host may enter autocast around a model that leaves it again: empty if no module inside another ran under it."""
        dtypes: Counter[str] = Counter()
        inner = [call for call in self.forward if call.leaf]
        if inner and not any(call.autocast.enabled for call in inner):
            return dtypes
        for call in self.forward:
            if call.autocast.enabled:
                dtypes[call.autocast.dtype] += call.count
        return dtypes

    def followed_by(self, later: StepTrace) -> StepTrace:
        """Two watched steps of one phase as one; the region numbers of the later step continue those of this one."""
        shift = len(self.regions)

        def shifted(index: int | None) -> int | None:
            return None if index is None else index + shift

        regions = (replace(one, index=one.index + shift, outer=shifted(one.outer)) for one in later.regions)
        calls = (replace(call, region=shifted(call.region)) for call in later.calls)
        later = replace(later, regions=tuple(regions), calls=tuple(calls))
        both = ((fact, getattr(self, fact.name), getattr(later, fact.name)) for fact in fields(self))
        return StepTrace(**{fact.name: fact.metadata["merge"](one, other) for fact, one, other in both})

    def around(self, index: int | None) -> Iterator[AutocastRegion]:
        """Region ``index`` and the regions around it, innermost first."""
        while index is not None:
            region = self.regions[index]
            yield region
            index = region.outer
