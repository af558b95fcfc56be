"""Take the plain PyTorch path of a custom kernel during an export."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """A function that calls an extension past the dispatcher, and its library's equivalent in tensor operations.

    Both are written ``package.module:name``. ``takes`` are the positions, among the arguments of the first, of those
    that the second takes.
    """

    function: str
    plain: str
    takes: tuple[int, ...]


# The arguments are value, spatial shapes, start of each level, sampling locations, attention weights, im2col step.
_DEFORMABLE = (0, 1, 3, 4)

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "mmcv.ops.multi_scale_deform_attn:MultiScaleDeformableAttnFunction.apply",
        "mmcv.ops.multi_scale_deform_attn:multi_scale_deformable_attn_pytorch",
        _DEFORMABLE,
    ),
    Kernel(
        "mask2former.modeling.pixel_decoder.ops.modules.ms_deform_attn:MSDeformAttnFunction.apply",
        "mask2former.modeling.pixel_decoder.ops.functions.ms_deform_attn_func:ms_deform_attn_core_pytorch",
        _DEFORMABLE,
    ),
    Kernel(
        "models.ops.modules.ms_deform_attn:MSDeformAttnFunction.apply",
        "models.ops.functions.ms_deform_attn_func:ms_deform_attn_core_pytorch",
        _DEFORMABLE,
    ),
)


@contextlib.contextmanager
def plain_kernels(exchange: Mapping[str, Callable[..., Any]] | None = None) -> Iterator[tuple[str, ...]]:
    """Take the plain PyTorch path of known custom kernels, and of those in ``exchange``, inside the ``with`` block.

    ``exchange`` maps a function, written ``package.module:name``, to one that takes the same arguments and computes the
    same in tensor operations. It is exchanged in every module that has imported it by name. Known kernels are those of
    ``KERNELS`` whose library has been imported. Yields the names of the exchanged functions; all are put back
    afterwards. Raises ``ValueError`` for a name that does not exist.

    Names are looked up in modules: a reference that a model keeps itself is not exchanged.
    """
    exchanged: dict[str, Callable[..., Any]] = {}
    for kernel in KERNELS:
        if kernel.function.partition(":")[0] in sys.modules and kernel.plain.partition(":")[0] in sys.modules:
            exchanged[kernel.function] = _taking(_found(kernel.plain)[2], kernel.takes)
    exchanged.update(exchange or {})
    places = [place for name, function in exchanged.items() for place in _places(name, function)]
    before: list[tuple[Any, str, bool, Any]] = []
    try:
        for owner, attribute, function in places:
            own = attribute in vars(owner)
            before.append((owner, attribute, own, vars(owner)[attribute] if own else None))
            setattr(owner, attribute, staticmethod(function) if isinstance(owner, type) else function)
        yield tuple(exchanged)
    finally:
        for owner, attribute, own, original in reversed(before):
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


def _places(name: str, function: Callable[..., Any]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Where callers find the function of this name: in its owner, and in the modules that import it from there."""
    owner, attribute, original = _found(name)
    places = [(owner, attribute, function)]
    if isinstance(owner, ModuleType):
        for module in [one for one in list(sys.modules.values()) if isinstance(one, ModuleType) and one is not owner]:
            places += [(module, other, function) for other, value in list(vars(module).items()) if value is original]
    return places


def _taking(plain: Callable[..., Any], positions: tuple[int, ...]) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        return plain(*(args[position] for position in positions))

    return function


def _found(name: str) -> tuple[Any, str, Any]:
    """The owner, the attribute's name and its value."""
    module, _, path = name.partition(":")
    *outer, attribute = path.split(".")
    try:
        owner: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        return owner, attribute, getattr(owner, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no function {name!r}: {error}") from error
