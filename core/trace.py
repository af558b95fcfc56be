"""What was seen: plain data that holds no tensor, module or frame."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ampcheck.precision import Precision

Phase = Literal["training", "evaluation"]
Role = Literal["write", "save", "raise", "cast", "call"]
Writer = Literal["code", "optimizer", "buffer-broadcast", "parameter-gather"]
Silent = Literal["untracked", "hooks", "outside", "unmarked"]


@dataclass(frozen=True)
class Site:
    """A place in somebody's source: file, line and function, and what happened there."""

    file: str
    line: int
    function: str
    code: str = ""
    role: Role = "call"
    module: str | None = None
    op: str | None = None
    node: str | None = None
    slot: str | None = None

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"


def described(error: BaseException) -> str:
    """An exception in one string, by which the facts that belong to it are told from those of another."""
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Host:
    """The framework that owns the training loop, and the remedies in its own words, by rule code."""

    name: str
    version: str
    fixes: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Environment:
    """The torch in use. ``native`` maps ``(device type, dtype)`` to whether the device computes in that dtype
    natively: true, false (not supported, or emulated), absent where torch cannot tell.

    ``autocast_cache_fault``: weights cast under ``no_grad`` stay in autocast's cache and lose their gradients
    (https://github.com/pytorch/pytorch/issues/158232), found by trying it.
    """

    torch: str
    native: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    autocast_cache_fault: bool = False


class TensorInfo(NamedTuple):
    """A parameter or buffer, by its qualified name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    device_type: str
    requires_grad: bool = False
    buffer: bool = False


class ModuleInfo(NamedTuple):
    """A module of the model with the tensors it owns itself: counts by dtype."""

    name: str
    type: str
    parameters: Mapping[str, int] = {}
    buffers: Mapping[str, int] = {}


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer: how many parameter tensors it holds, how many of them are the model's, and their dtypes.

    ``unscales``: it divides by the loss scale itself, as fused ones do, and takes float16 gradients. ``alike``: the
    shapes of its parameters are those of the model's trainable ones, as of a copy.
    """

    type: str
    parameters: int
    of_model: int
    dtypes: Mapping[str, int] = field(default_factory=dict)
    unscales: bool = False
    alike: bool = True


@dataclass(frozen=True)
class ScalerInfo:
    """A gradient scaler. ``deprecated`` names the old spelling it was made with, if any."""

    type: str
    enabled: bool
    device_type: str
    deprecated: str | None = None


class Policy(NamedTuple):
    """The mixed precision policy of a sharded module, by the module's qualified name: the dtype it casts parameters
    to for forward (``None``: it casts none), and whether it casts the module's inputs too. ``source`` spells it."""

    module: str
    dtype: str | None
    casts_inputs: bool
    source: str


@dataclass(frozen=True)
class ModelInfo:
    """The fit-start walk over one model. ``device_type`` is where most of its elements lie. ``policies`` are those of
    the modules that are sharded, outermost first."""

    type: str
    device_type: str
    modules: tuple[ModuleInfo, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    compiled: bool = False
    policies: tuple[Policy, ...] = ()

    def policy_of(self, module: str | None) -> Policy | None:
        """The policy that a module is under: that of the innermost sharded module around it."""
        around = [p for p in self.policies if module is not None and _encloses(p.module, module)]
        return max(around, key=lambda policy: len(policy.module), default=None)

    @property
    def parameters(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in self.tensors if not t.buffer)

    @property
    def buffers(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in self.tensors if t.buffer)


class AutocastState(NamedTuple):
    """Autocast as it stood at one moment, for the model's device type."""

    device_type: str
    enabled: bool
    dtype: str
    cache: bool = True

    def __str__(self) -> str:
        return f"autocast {self.dtype}" if self.enabled else "autocast off"


@dataclass(frozen=True)
class AutocastRegion:
    """An autocast region that was entered. ``requested`` is the ``enabled=`` it was made with and ``enabled`` what
    torch made of it (``None``: it was made before the watch began). ``outer`` is the index of the region around it.
    ``by_user`` is false where installed code entered it, whatever user code called that. ``left_by`` is the exception
    that left it (see ``described``), which was raised under it.
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
    """Calls of one module that looked alike. ``inputs`` and ``outputs`` are the dtypes of floating tensors in
    order, ``region`` the innermost autocast region around the call (an index into ``StepTrace.regions``).
    ``module`` is the qualified name, or ``None`` for a module that is no part of the model (a loss, say).
    ``parameters`` are the dtypes that the module's own parameters had while a sharded model computed with them.
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
    """An input of an op. ``name`` is the qualified name of the parameter or buffer it is, or is a view of."""

    dtype: str
    shape: tuple[int, ...]
    name: str | None = None


@dataclass(frozen=True)
class OpCall:
    """Calls of one function that looked alike and are of interest to a rule (see ``ampcheck.probes.graph``)."""

    op: str
    module: str | None
    autocast: AutocastState
    operands: tuple[Operand, ...]
    outputs: tuple[str, ...]
    site: Site | None
    count: int = 1


@dataclass(frozen=True)
class ScalerCall:
    """A call of interest to loss scaling, in the order they came: ``scale``, ``backward``, ``unscale``, ``clip``,
    ``step`` or ``update``; calls of a disabled scaler are left out.

    ``optimizers`` numbers the optimizers it concerns, in the order the scaler stepped or unscaled them. ``scaled``
    says of ``backward`` that the loss was scaled, of ``clip`` that gradients were clipped while still scaled.
    ``skipped`` says of ``step`` that the scaler left the optimizer's step out. ``None``: not to be told.
    """

    op: str
    site: Site | None
    optimizers: tuple[int, ...] = ()
    scaled: bool | None = None
    skipped: bool | None = None


@dataclass(frozen=True)
class StepTrace:
    """One watched phase. ``model`` is the walk over what was evaluated, where that is another object than the
    model that trains (an averaged or a half-precision copy). ``cache_cleared`` says that somebody called
    ``torch.clear_autocast_cache`` inside a region. ``complete`` is false where something was compiled, so that only
    the way into it was seen."""

    calls: tuple[ModuleCall, ...] = ()
    regions: tuple[AutocastRegion, ...] = ()
    ops: tuple[OpCall, ...] = ()
    steps: int = 1
    model: ModelInfo | None = None
    cache_cleared: bool = False
    complete: bool = True
    scaling: tuple[ScalerCall, ...] = ()
    died_of: str | None = None

    @functools.cached_property
    def forward(self) -> tuple[ModuleCall, ...]:
        """The calls of the forward pass: those that backward repeats left out, and where some ran with gradients
        those that ran without (a teacher, a metric) too."""
        calls = tuple(call for call in self.calls if not call.in_backward)
        return tuple(call for call in calls if call.grad_enabled) or calls

    @functools.cached_property
    def in_force(self) -> Counter[str]:
        """Module calls of the forward pass by the autocast dtype they ran under; calls with autocast off left out. A
        host may enter autocast around a model that leaves it again: none, where no module inside another ran under
        it."""
        dtypes: Counter[str] = Counter()
        inner = [call for call in self.forward if call.leaf]
        if inner and not any(call.autocast.enabled for call in inner):
            return dtypes
        for call in self.forward:
            if call.autocast.enabled:
                dtypes[call.autocast.dtype] += call.count
        return dtypes

    def around(self, index: int | None) -> Iterator[AutocastRegion]:
        """Region ``index`` and the regions around it, innermost first."""
        while index is not None:
            region = self.regions[index]
            yield region
            index = region.outer


@dataclass(frozen=True)
class Write:
    """A write to a tensor's memory. ``by`` tells whose it was: the code's own, an optimizer's, or data-parallel
    training's, which sends the buffers of rank 0 to all. ``library`` is the line of the library, other than PyTorch,
    that the user's line led to. Versions and shape are those of the tensor that was written to."""

    op: str
    site: Site | None
    library: Site | None = None
    by: Writer = "code"
    version_before: int | None = None
    version_after: int | None = None
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class StaleTensor:
    """A saved tensor that was overwritten after autograd saved it.

    ``node`` and ``slot`` say what saved it (``ReluBackward0``, ``result``), ``op`` the op of the forward pass, and
    ``name`` the parameter or buffer that it is. ``writes`` are those since the save, earliest first; none where the
    write was not seen. ``silent`` says why PyTorch's own check passed it: ``"untracked"``, the write went past the
    version counter; ``"hooks"``, saved-tensor hooks; ``"outside"``, the content changed and no op of PyTorch's
    wrote it; ``"unmarked"``, a custom function wrote to its input without ``mark_dirty``. ``None``: PyTorch found it.
    """

    node: str
    slot: str | None
    dtype: str
    shape: tuple[int, ...]
    op: str | None = None
    save: Site | None = None
    library: Site | None = None
    writes: tuple[Write, ...] = ()
    version_saved: int | None = None
    version_found: int | None = None
    name: str | None = None
    buffer: bool = False
    silent: Silent | None = None


@dataclass(frozen=True)
class UncheckedSave:
    """A tensor that saved-tensor hooks handed back as it was: its version is no longer checked. ``hooks`` is the
    site of the hook that packed it, where this PyTorch can tell."""

    node: str
    save: Site | None
    hooks: Site | None


@dataclass(frozen=True)
class GraphTrace:
    """What the write probe saw of the autograd graph. Of ``stale`` the first is the one that backward met first.

    ``views`` are the calls that returned several views at once (``split``, ``unbind``), ``inference`` those that
    made tensors under ``inference_mode``, ``backwards`` the backward passes begun, and ``cut`` the calls behind
    which the failing loss has no graph: each the site of the call, the latest last. ``hooked`` names the modules with
    full backward hooks, and ``replay`` says how a replay of the failing batch went, where there was one.
    ``written_views`` are those of ``views`` whose base was written to later, each with the writes.
    """

    stale: tuple[StaleTensor, ...] = ()
    unchecked: tuple[UncheckedSave, ...] = ()
    views: tuple[Site, ...] = ()
    inference: tuple[Site, ...] = ()
    backwards: tuple[Site, ...] = ()
    cut: tuple[Site, ...] = ()
    hooked: tuple[str, ...] = ()
    replay: str | None = None
    written_views: tuple[tuple[Site, tuple[Site, ...]], ...] = ()


@dataclass(frozen=True)
class Failure:
    """An exception, taken apart. ``chain`` holds ``(type, message)`` of it and of its causes, outermost first;
    ``sites`` the frames of the innermost one that matters, innermost first, user frames before library frames;
    ``fields`` what its message and its frames say (by the classifier that recognised it, ``kind``)."""

    type: str
    message: str
    phase: str
    step: int | None
    kind: str | None = None
    chain: tuple[tuple[str, str], ...] = ()
    sites: tuple[Site, ...] = ()
    module: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


Reason = Literal[
    "data-dependent",
    "frozen-shape",
    "training-mode",
    "buffer-update",
    "state-differs",
    "left-dispatcher",
    "unsettled",
    "raises",
]


@dataclass(frozen=True)
class Tolerance:
    """By how much tensors of ``dtype`` may differ: ``absolute + relative * the largest value of the eager tensor``.
    ``source`` says whose practice that is."""

    dtype: str
    relative: float
    absolute: float
    source: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.relative:g} relative, {self.absolute:g} absolute ({self.source})"


@dataclass(frozen=True)
class OutputError:
    """An output of the model, and the largest difference over all inputs tried: ``absolute``, and ``relative`` to
    the largest value of the eager output. ``inputs`` are those it was largest on. Infinite: another shape, or
    non-finite values in one of the two alone."""

    output: str
    dtype: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    equal: bool
    inputs: str


@dataclass(frozen=True)
class ModuleError:
    """A call of a module, and how far its outputs differ. ``inputs_equal``: what it was given agreed (``None``: not
    to be told)."""

    module: str
    type: str
    call: int
    dtype: str
    absolute: float
    relative: float
    equal: bool
    inputs_equal: bool | None = None


@dataclass(frozen=True)
class BakedConstant:
    """A constant of the exported graph that is an activation of the eager model. ``target`` is the function that
    computed it, as ``package.module:function``."""

    module: str
    dtype: str
    shape: tuple[int, ...]
    site: Site | None
    target: str | None = None


@dataclass(frozen=True)
class OpaqueCall:
    """A node of the exported graph that nothing outside Python can run: ``"python"``, ``"autograd-function"`` or
    ``"no-schema"``."""

    kind: str
    name: str
    module: str
    site: Site | None


@dataclass(frozen=True)
class CapturedCasts:
    """Casts to ``dtype`` in a module of the exported graph that the eager module does not make."""

    dtype: str
    module: str
    count: int
    site: Site | None


@dataclass(frozen=True)
class Cause:
    """Why an export differs, or will: a fact found in the graph or by running both."""

    reason: Reason
    module: str | None
    detail: str
    sites: tuple[Site, ...] = ()
    certain: bool = True


@dataclass(frozen=True)
class Comparison:
    """A model in two forms, run on the same inputs. ``modules`` are in the order their calls ended, for the inputs
    that differ most; ``unseen`` says why there are none. ``rounding`` is set where the difference is one of
    low-precision rounding: both are as far from float32 as each other (the two relative errors)."""

    first: str
    second: str
    outputs: tuple[OutputError, ...]
    tolerances: tuple[Tolerance, ...]
    inputs: tuple[str, ...]
    modules: tuple[ModuleError, ...] = ()
    unseen: str | None = None
    causes: tuple[Cause, ...] = ()
    constants: tuple[BakedConstant, ...] = ()
    opaque: tuple[OpaqueCall, ...] = ()
    casts: tuple[CapturedCasts, ...] = ()
    rounding: tuple[float, float] | None = None
    export: bool = True

    @property
    def equal(self) -> bool:
        return all(output.equal for output in self.outputs) and not any(c.reason == "raises" for c in self.causes)

    @property
    def first_module(self) -> ModuleError | None:
        """The first module in execution order whose output differs."""
        return next((module for module in self.modules if not module.equal), None)

    @property
    def culprit(self) -> str | None:
        """The first module that makes the difference: its inputs agree and its outputs do not. Where the first
        module that differs was already given something else, that is the module around it."""
        first = self.first_module
        if first is None or first.inputs_equal is not False:
            return first.module if first else None
        around = [m for m in self.modules if not m.equal and m.inputs_equal and _encloses(m.module, first.module)]
        return max(around, key=lambda module: len(module.module)).module if around else ""

    def ranked(self) -> list[ModuleError]:
        """The calls of modules by relative error, the largest first."""
        return sorted(self.modules, key=lambda module: -module.relative)


def _encloses(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


@dataclass(frozen=True)
class Trace:
    """All that is known of a run. A fact that was not observed is ``None``, and ``unobserved`` says why, by field.

    ``internal_error`` is the exception that made AmpCheck switch itself off, in one line.
    """

    precision: Precision = field(default_factory=Precision)
    environment: Environment = field(default_factory=lambda: Environment(torch=""))
    host: Host | None = None
    model: ModelInfo | None = None
    optimizers: tuple[OptimizerInfo, ...] = ()
    scaler: ScalerInfo | None = None
    averaged: ModelInfo | None = None
    training: StepTrace | None = None
    evaluation: StepTrace | None = None
    failure: Failure | None = None
    graph: GraphTrace | None = None
    comparison: Comparison | None = None
    unobserved: Mapping[str, str] = field(default_factory=dict)
    internal_error: str | None = None

    @property
    def uncompiled(self) -> Literal[True] | None:
        """True where nothing is compiled, so that what runs inside the model was seen; else ``None``."""
        compiled = self.model is not None and self.model.compiled
        return None if compiled or (self.training is not None and not self.training.complete) else True
