"""What an op's schema says about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ampcheck.observe.probes.graph_log import op_name


class KnownOp(NamedTuple):
    """An op: the positions and names of the arguments it writes to, and whether it counts their versions itself."""

    name: str
    targets: tuple[tuple[int, str], ...]
    counted: bool


def known_op(func: Any) -> KnownOp:
    targets = write_targets(func)
    counted = not targets or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "ADInplaceOrView")
    return KnownOp(op_name(func), targets, counted)


def write_targets(func: Any) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that an op writes to."""
    schema = getattr(func, "_schema", None)
    # The running statistics that batch norm writes to play no part in its gradient.
    if schema is None or "batch_norm" in schema.name:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def counting_versions(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an op whose inner ops count versions for it (a list op): under a mode they would not."""
    if torch.is_inference_mode_enabled():
        return func(*args, **kwargs)
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return func(*args, **kwargs)
