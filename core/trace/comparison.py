"""What running two forms of a model on the same inputs showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ampcheck.trace.model import encloses
from ampcheck.trace.site import Site

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
    """How much tensors of ``dtype`` may differ: ``absolute + relative * the largest value of the eager tensor``.
    ``source`` says where the numbers come from."""

    dtype: str
    relative: float
    absolute: float
    source: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.relative:g} relative, {self.absolute:g} absolute ({self.source})"


@dataclass(frozen=True)
class OutputError:
    """An output of the model, and its largest difference over all inputs tried: ``absolute``, and ``relative`` to
    the largest value of the eager output. ``inputs`` are those with the largest difference. Infinite: the shapes
    differ, or only one of the two has non-finite values."""

    output: str
    dtype: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    equal: bool
    inputs: str


@dataclass(frozen=True)
class ModuleError:
    """A call of a module, and how far its outputs differ. ``inputs_equal``: its inputs agreed (``None``: unknown)."""

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
    """Why an export differs, or will differ: a fact found in the graph or by running both models."""

    reason: Reason
    module: str | None
    detail: str
    sites: tuple[Site, ...] = ()
    certain: bool = True


@dataclass(frozen=True)
class Comparison:
    """A model in two forms, run on the same inputs. ``modules`` are in the order in which their calls ended, for the
    inputs that differ most; ``unseen`` says why there are none. ``rounding`` is set if low-precision rounding causes
    the difference: both are equally far from float32 (the two relative errors). ``left_out`` says which inputs were not
    tried, and why."""

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
    left_out: str | None = None

    @property
    def equal(self) -> bool:
        return all(output.equal for output in self.outputs) and not any(c.reason == "raises" for c in self.causes)

    @property
    def first_module(self) -> ModuleError | None:
        """The first module in execution order whose output differs."""
        return next((module for module in self.modules if not module.equal), None)

    @property
    def culprit(self) -> str | None:
        """The first module that makes the difference: its inputs agree and its outputs do not. If the inputs of the
        first module that differs already differ, it is the module around that one."""
        first = self.first_module
        if first is None or first.inputs_equal is not False:
            return first.module if first else None
        around = [m for m in self.modules if not m.equal and m.inputs_equal and encloses(m.module, first.module)]
        return max(around, key=lambda module: len(module.module)).module if around else ""

    def ranked(self) -> list[ModuleError]:
        """The calls of modules by relative error, the largest first."""
        return sorted(self.modules, key=lambda module: -module.relative)
