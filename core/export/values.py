"""Inputs and outputs as flat tensors: draw fresh ones, and measure how far apart two of them are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ampcheck.observe.tensors import same_values
from ampcheck.observe.walk import dtype_name
from ampcheck.trace import Tolerance

# assert_close: https://pytorch.org/docs/stable/testing.html; trace: `check_tolerance` of torch.jit.trace;
# onnx: `rtol` of torch.onnx.verification. Kernels sum in different orders, more than assert_close's 1.3e-6 allows.
_CLOSE = {torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float64: (1e-7, 1e-7)}
_SLICE = 8
_RELATIVE = {"torch": (1e-5, "torch.jit.trace's check_tolerance"), "onnx": (1e-3, "torch.onnx.verification's rtol")}


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, and a name for it: ``the example``, ``fresh values``..."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    name: str = "the example"

    @staticmethod
    def of(inputs: object, name: str = "the example") -> Inputs:
        """Inputs from a tensor, a sequence of positional arguments or a mapping of keywords. Raises ``ValueError``."""
        if isinstance(inputs, Inputs):
            return inputs
        if isinstance(inputs, Mapping):
            found = Inputs((), {str(key): value for key, value in inputs.items()}, name)
        elif isinstance(inputs, (tuple, list)):
            found = Inputs(tuple(inputs), {}, name)
        else:
            found = Inputs((inputs,), {}, name)
        if not found.tensors:
            raise ValueError("the inputs hold no tensor: give a tensor, a tuple of arguments or a mapping of keywords")
        return found

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_in((self.args, dict(self.kwargs)))

    def map(self, change: Callable[[int, Tensor], Tensor], name: str) -> Inputs:
        """The same inputs with every tensor replaced by ``change(index, tensor)``."""
        leaves, spec = pytree.tree_flatten((self.args, dict(self.kwargs)))
        index = iter(range(len(leaves)))
        changed = [change(next(index), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(changed, spec)
        return Inputs(args, kwargs, name)

    def copied(self) -> Inputs:
        """A copy, for a model that may write to its inputs."""
        return self.map(lambda _, tensor: tensor.detach().clone(), self.name)


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in nested containers, data classes included, in order."""
    return [leaf for leaf in leaves_in(value).values() if isinstance(leaf, Tensor)]


def leaves_in(value: object, name: str = "output") -> dict[str, object]:
    """Tensors, and whatever else is not a container, by their path: ``output['logits'][0]``."""
    found: dict[str, object] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found.update(leaves_in(item, f"{name}[{key!r}]"))
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None)
        for index, item in enumerate(value):
            found.update(leaves_in(item, f"{name}.{names[index]}" if names else f"{name}[{index}]"))
    elif isinstance(value, Tensor) or not hasattr(value, "__dataclass_fields__"):
        found[name] = value
    else:
        for key, item in vars(value).items():
            found.update(leaves_in(item, f"{name}.{key}"))
    return found


def named_tensors(value: object) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in leaves_in(value).items() if isinstance(leaf, Tensor)}


def described(tensor: Tensor) -> str:
    """``float32[2, 3]``"""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def fresh(example: Inputs, seed: int) -> list[Inputs]:
    """Inputs with the shapes, dtypes and ranges of the example, but other values.

    They are drawn anew, mirrored within the range, and drawn with a tenth of the contrast. What is constant in the
    example is drawn from zero to one.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        example.map(lambda _, t: _drawn(t, tuple(t.shape), generator), "fresh values"),
        example.map(lambda _, t: _mirrored(t, generator), "mirrored values"),
        example.map(lambda _, t: _faded(t, generator), "values of a tenth the contrast"),
    ]


def resized(example: Inputs, shapes: Sequence[tuple[int, ...]], name: str, seed: int) -> Inputs:
    """Fresh inputs whose tensors have ``shapes``."""
    generator = torch.Generator().manual_seed(seed)
    wanted = iter(shapes)
    return example.map(lambda _, tensor: _drawn(tensor, next(wanted), generator), name)


def other_size(given: int, bounds: Any, *, double: bool) -> int:
    """Another size within ``bounds``, which have a ``lower`` and an ``upper`` (``None``: any)."""
    for size in (2 * given,) if double else (given + 1, given + 2, given - 1, 2 * given):
        if size >= 2 and (bounds is None or bounds.lower <= size <= bounds.upper):
            return size
    return given


def _range(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().to("cpu", torch.float64)
    values = values[values.isfinite()]
    if not values.numel():
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (min(0.0, low), max(1.0, high))


def _drawn(tensor: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if tensor.dtype == torch.bool:
        return (torch.rand(shape, generator=generator) < 0.5).to(tensor.device)
    low, high = _range(tensor) if tensor.numel() else (0.0, 1.0)
    if not tensor.is_floating_point():
        constant = tensor.numel() and bool((tensor == tensor.reshape(-1)[0]).all())
        # A constant integer may be a size or a mode: no other value is known to be valid.
        if constant or tensor.is_complex():
            return tensor.reshape(-1)[:1].expand(math.prod(shape)).reshape(shape).clone() if tensor.numel() else tensor
        return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(tensor.device, tensor.dtype)
    values = tensor.detach().to("cpu", torch.float64)
    spread = float(values.std()) if tensor.numel() > 1 else 0.0
    if spread > 0 and math.isfinite(spread):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + float(values.mean())
    else:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn.clamp(low, high).to(tensor.device, tensor.dtype)


def _mirrored(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return _drawn(tensor, tuple(tensor.shape), generator)
    low, high = _range(tensor)
    return (low + high - tensor.detach()).to(tensor.dtype)


def _faded(tensor: Tensor, generator: torch.Generator) -> Tensor:
    drawn = _drawn(tensor, tuple(tensor.shape), generator)
    if not tensor.is_floating_point():
        return drawn
    low, high = _range(tensor)
    dark = 0.0 if low <= 0 <= high else low
    return (dark + 0.1 * (drawn - dark)).to(tensor.dtype)


class Tolerances:
    """Tolerances by dtype.

    Given values replace the usual ones for every floating-point dtype. ``computed_in`` is the dtype whose rounding is
    to be expected, if that is not the tensors' own.
    """

    def __init__(
        self,
        practice: str,
        relative: float | None = None,
        absolute: float | None = None,
        computed_in: torch.dtype | None = None,
    ) -> None:
        self._practice, self._relative, self._absolute = practice, relative, absolute
        self._computed_in = computed_in
        self.used: dict[torch.dtype, Tolerance] = {}

    def of(self, dtype: torch.dtype) -> Tolerance:
        found = self.used.get(dtype)
        if found is None:
            found = self.used[dtype] = self._choose(dtype)
        return found

    def rounding(self, dtype: torch.dtype) -> float:
        """How far sums in another order may differ, relative to the largest value of the tensor."""
        return 8 * torch.finfo(self._computed_in or dtype).eps

    def _choose(self, dtype: torch.dtype) -> Tolerance:
        name = dtype_name(dtype)
        if not (dtype.is_floating_point or dtype.is_complex):
            return Tolerance(name, 0.0, 0.0, "exact")
        source = "torch.testing.assert_close"
        relative, absolute = _CLOSE.get(dtype, (0.0, 1e-5))
        if not relative:
            relative, source = _RELATIVE[self._practice]
        if self._relative is not None or self._absolute is not None:
            relative = relative if self._relative is None else self._relative
            absolute = absolute if self._absolute is None else self._absolute
            source = "given"
        return Tolerance(name, relative, absolute, source)


@dataclass(frozen=True)
class Distance:
    """How far apart two tensors are.

    These are the largest absolute difference, the same relative to the largest eager value, and whether it is within
    tolerance.
    """

    absolute: float
    relative: float
    equal: bool


APART = Distance(math.inf, math.inf, False)


@torch.no_grad()
def distance(
    eager: Tensor, other: Tensor, tolerances: Tolerances, operands: float = 0.0, ordered: int | None = None
) -> Distance:
    """Compare two tensors by value, on the CPU, in float64. NaN and infinity equal themselves.

    The dtype with the wider tolerance decides. Differences are measured by the largest value of the tensor, and then by
    the largest of each row and channel: one tensor may hold boxes in pixels and scores below one.

    ``operands`` is the largest value that the tensor was computed from: rounding of that size is not a difference.
    ``ordered`` is an axis along which both are sorted first, to compare only what the values are, and not where they
    are along it.
    """
    if eager.shape != other.shape:
        return APART
    dtype = max(eager.dtype, other.dtype, key=lambda dtype: tolerances.of(dtype).relative)
    tolerance = tolerances.of(dtype)
    # Most modules agree to the bit, and the rest costs ten passes over them.
    if eager.dtype == other.dtype and eager.device == other.device and same_values(eager, other):
        return Distance(0.0, 0.0, True)
    wide = torch.complex128 if eager.is_complex() or other.is_complex() else torch.float64
    a, b = (tensor.detach().to_dense().to("cpu", wide) for tensor in (eager, other))
    if not a.numel():
        return Distance(0.0, 0.0, True)
    if ordered is not None:
        a, b = (torch.view_as_real(values) if values.is_complex() else values for values in (a, b))
        a, b = (values.sort(ordered).values for values in (a, b))
    finite = a.isfinite() & b.isfinite()
    odd = ~finite & ~((a == b) | (a.isnan() & b.isnan()))
    if odd.any():
        return APART
    sizes, errors = a.abs().where(finite, 0), (a - b).abs().where(finite, 0)
    largest, absolute = float(sizes.max()), float(errors.max())
    # An absolute tolerance larger than the values themselves would let anything pass.
    floor = min(tolerance.absolute, 1e-2 * max(largest, operands)) if largest else tolerance.absolute
    relative = absolute / largest if largest else (math.inf if absolute else 0.0)
    if absolute > floor + tolerance.relative * largest:
        return Distance(absolute, relative, False)
    equal = True
    if tolerance.relative and absolute:
        floor += min(tolerance.relative, tolerances.rounding(dtype)) * largest
        for axis, length in enumerate(a.shape):
            if axis != ordered and length > 1 and a.numel() // length >= _SLICE:
                wrong, scale = (values.movedim(axis, 0).flatten(1).amax(1) for values in (errors, sizes))
                apart = wrong > floor + tolerance.relative * scale
                if apart.any():
                    relative, equal = max(relative, float((wrong / scale)[apart].max())), False
    return Distance(absolute, relative, equal)


def closest(
    eager: Tensor, candidates: Sequence[Tensor], tolerances: Tolerances, operands: float = 0.0
) -> Distance | None:
    """The distance to the nearest candidate of the same shape; ``None`` if there is none."""
    found = [
        distance(eager, candidate, tolerances, operands) for candidate in candidates if candidate.shape == eager.shape
    ]
    return min(found, key=lambda d: d.relative) if found else None
