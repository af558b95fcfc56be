"""What the fit-start walk sees: the model, its optimizers and its scaler, and where they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Host:
    """The framework that owns the training loop, and the fixes in its own words, by rule code.

    A fix for one situation of a rule comes under ``"AMP105:only-training"``; it may be empty.
    """

    name: str
    version: str
    fixes: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Environment:
    """The torch in use. ``native`` maps ``(device type, dtype)`` to whether the device supports that dtype natively:
    true, false (not supported, or emulated), absent if torch cannot tell.

    ``autocast_cache_fault``: weights cast under ``no_grad`` stay in autocast's cache and lose their gradients
    (https://github.com/pytorch/pytorch/issues/158232); AmpCheck tries it.
    """

    torch: str
    native: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    autocast_cache_fault: bool = False


class TensorInfo(NamedTuple):
    """A parameter or buffer, by its qualified name. ``inference``: it was made under ``inference_mode``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    device_type: str
    requires_grad: bool = False
    buffer: bool = False
    inference: bool = False


class ModuleInfo(NamedTuple):
    """A module of the model with the tensors it owns itself: counts by dtype."""

    name: str
    type: str
    parameters: Mapping[str, int] = {}
    buffers: Mapping[str, int] = {}


@dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer: how many parameter tensors it holds, how many of them are the model's, and their dtypes.

    ``unscales``: it divides by the loss scale itself, as fused optimizers do, and takes float16 gradients. ``alike``:
    its parameters have the shapes of the model's trainable ones, like those of a copy. ``names`` are
    those of its parameters that are the model's, ``others`` the shapes of the rest, of which nothing but the optimizer
    holds ``orphans``. ``eps_lost`` holds each ``eps`` that is 0 in the dtype of the group's parameters, with that
    dtype.
    """

    type: str
    parameters: int
    of_model: int
    dtypes: Mapping[str, int] = field(default_factory=dict)
    unscales: bool = False
    alike: bool = True
    names: frozenset[str] = frozenset()
    others: tuple[tuple[int, ...], ...] = ()
    orphans: int = 0
    eps_lost: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class ScalerInfo:
    """A gradient scaler. ``deprecated`` names the old spelling it was made with, if any."""

    type: str
    enabled: bool
    device_type: str
    deprecated: str | None = None


class Policy(NamedTuple):
    """The mixed precision policy of a sharded module, by the module's qualified name: the dtype that it casts
    parameters to for forward (``None``: it casts none), and whether it casts the module's inputs too. ``source`` is the
    policy as code."""

    module: str
    dtype: str | None
    casts_inputs: bool
    source: str


def encloses(outer: str, inner: str) -> bool:
    """Whether the module ``outer`` is ``inner`` or contains it, by their qualified names."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


@dataclass(frozen=True)
class ModelInfo:
    """The fit-start walk over one model. ``device_type`` is where most of its elements are. ``policies`` are those of
    the sharded modules, outermost first."""

    type: str
    device_type: str
    modules: tuple[ModuleInfo, ...] = ()
    tensors: tuple[TensorInfo, ...] = ()
    compiled: bool = False
    policies: tuple[Policy, ...] = ()

    def policy_of(self, module: str | None) -> Policy | None:
        """The policy of a module: that of the innermost sharded module around it."""
        around = [p for p in self.policies if module is not None and encloses(p.module, module)]
        return max(around, key=lambda policy: len(policy.module), default=None)

    @property
    def parameters(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in self.tensors if not t.buffer)

    @property
    def buffers(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in self.tensors if t.buffer)
