"""Dtype failures: operations that failed on the dtypes of their operands, and calls of ``autocast`` that failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ampcheck.trace.site import Site

AutocastFault = Literal[
    "device-keyword",
    "device-type-keyword",
    "unexpected-keyword",
    "no-device-type",
    "device-not-a-string",
    "dtype-not-a-dtype",
    "unknown-device",
    "wrong-arguments",
]


@dataclass(frozen=True)
class AutocastCall:
    """A call of ``autocast`` that failed because of ``argument``. ``corrected`` is what to write instead: the call or,
    by ``replaces``, the mapping (or ``partial``) that held the argument.

    ``allowed`` are the arguments that it takes, ``type`` is the wrong type of a value, ``device`` what the message
    calls unknown. ``call`` and ``site`` are the call in the source, ``value`` is the argument as written there, and
    ``deprecated`` the old name of the function. ``kwargs_variable`` names the mapping, and ``kwargs_site`` is where it
    was written.
    """

    reason: AutocastFault
    argument: str
    corrected: str
    replaces: Literal["call", "kwargs"] = "call"
    allowed: tuple[str, ...] | None = None
    type: str | None = None
    device: str | None = None
    call: str | None = None
    site: Site | None = None
    value: str | None = None
    deprecated: str | None = None
    kwargs_variable: str | None = None
    kwargs_site: Site | None = None


@dataclass(frozen=True)
class Producer:
    """What made a tensor: the call of ``module`` or, if that is ``None``, the expression ``code``."""

    module: str | None
    code: str
    site: Site


@dataclass(frozen=True)
class FailedOperand:
    """An operand of the failed operation. ``name`` is the qualified name of a parameter or buffer (``stored`` says
    which), else the user's variable or expression, else a word of the message.

    ``device`` is ``None`` if only the message mentions the operand. ``role`` is the name of the argument,
    ``expression`` the cast in the failing line that gave it its dtype. ``library``: only installed code names it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None = None
    device: str | None = None
    role: str | None = None
    expression: str | None = None
    stored: Literal["parameter", "buffer"] | None = None
    library: bool = False
    producer: Producer | None = None

    @property
    def device_type(self) -> str | None:
        return self.device.partition(":")[0] if self.device else None


@dataclass(frozen=True)
class SourceRegion:
    """An autocast region around the crash, as the source shows it. ``None``: the source does not show it."""

    device_type: str | None
    enabled: bool | None
    site: Site


@dataclass(frozen=True)
class CustomFunction:
    """A custom ``autograd.Function``. ``method`` is the one that failed, ``module`` the module whose tensors it works
    on, if the frames tell. ``library``: it is installed code."""

    name: str
    method: Literal["forward", "backward"] | None = None
    site: Site | None = None
    custom_fwd: bool = False
    custom_bwd: bool = False
    cast_inputs: str | None = None
    setup_context: bool = False
    device_types: tuple[str, ...] = ()
    module: str | None = None
    library: bool = False


@dataclass(frozen=True)
class FailedOperation:
    """An operation that failed on the dtypes of its operands. ``dtypes`` are those that the message names,
    ``producers`` the lines that made the operands.

    ``op`` is its name in the dispatcher or in the message, ``expression`` the source. ``custom``: it is not PyTorch's
    own. ``autocast_rule``: autocast has a rule for it (``None``: unknown). ``in_place`` and ``out`` say where it writes
    to. ``regions`` are the autocast regions around it in the source, innermost first; ``opaque_regions``: another
    context manager there may be one too. ``thread``: it ran in another thread.
    """

    dtypes: tuple[str, ...] = ()
    operands: tuple[FailedOperand, ...] = ()
    producers: tuple[Site, ...] = ()
    op: str | None = None
    expression: str | None = None
    custom: bool = False
    autocast_rule: bool | None = None
    in_place: bool = False
    out: bool = False
    regions: tuple[SourceRegion, ...] = ()
    opaque_regions: bool = False
    thread: bool = False
    function: CustomFunction | None = None


@dataclass(frozen=True)
class OperationFailure:
    """A failure that one operation caused."""

    operation: FailedOperation


@dataclass(frozen=True)
class DtypeMismatch(OperationFailure):
    """Operands had different dtypes. ``promotes``: autocast itself refused to bring them to one dtype."""

    promotes: bool = False


@dataclass(frozen=True)
class InPlaceDtype(OperationFailure):
    """The target and the source of a write have different dtypes."""


@dataclass(frozen=True)
class OpNotImplemented(OperationFailure):
    """An operation has no kernel for a dtype."""


@dataclass(frozen=True)
class NoNumpyDtype(OperationFailure):
    """NumPy has no such dtype."""


@dataclass(frozen=True)
class CustomFunctionState:
    """``custom_bwd`` misses what ``custom_fwd`` would have recorded."""

    function: CustomFunction


@dataclass(frozen=True)
class UnsafeLoss:
    """A loss that autocast refuses to run in low precision."""
