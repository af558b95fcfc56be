"""The operation that failed on the dtypes of its operands, read from the message and the frames."""

from __future__ import annotations

import ast
import re

from ampcheck.failure.dtypes import canonical
from ampcheck.failure.frames import Scene, inner, still_running
from ampcheck.failure.operands import Naming, find_operation, from_message, operand_of, own_tensors, unread
from ampcheck.failure.surroundings import (
    autocast_regions,
    crossed_thread,
    custom_function,
    function_of_node,
    operator,
)
from ampcheck.precision import FLOATING
from ampcheck.trace import (
    CustomFunctionState,
    DtypeMismatch,
    FailedOperand,
    FailedOperation,
    InPlaceDtype,
    NoNumpyDtype,
    OpNotImplemented,
)

_REPLICA = re.compile(r"^Caught \w+ in replica \d+ on device")


def dtype_mismatch(scene: Scene) -> DtypeMismatch | InPlaceDtype | None:
    """The facts of a dtype mismatch; ``None`` if the frames show another fault with the same message."""
    dtypes = _dtypes(scene)
    told = set(dtypes.values())
    if told and ((len(told) == 1 and {"a", "b"} <= dtypes.keys()) or told - FLOATING):
        # The same dtype twice means that the devices differ; integers have nothing to do with precision.
        return None
    promotes = scene.said.get("promotes") is not None
    operation = _operation(scene)
    if not told and not promotes and _agree(operation):
        return None
    if (operation.op or "").endswith("lerp_"):
        return InPlaceDtype(operation)
    return DtypeMismatch(operation, promotes)


def in_place_dtype(scene: Scene) -> InPlaceDtype | None:
    """The facts of a write with different dtypes; ``None`` if the frames show another fault."""
    operation = _operation(scene, written=True)
    return None if not operation.dtypes and _agree(operation) else InPlaceDtype(operation)


def op_not_implemented(scene: Scene) -> OpNotImplemented | DtypeMismatch:
    """The facts of an op without a kernel, or of different dtypes if the message names none and nobody casts them."""
    operation = _operation(scene)
    cast = operation.opaque_regions or any(region.enabled is not False for region in operation.regions)
    mixed = len({operand.dtype for operand in operation.operands}) > 1
    return DtypeMismatch(operation) if mixed and not cast and not operation.dtypes else OpNotImplemented(operation)


def no_numpy_dtype(scene: Scene) -> NoNumpyDtype:
    return NoNumpyDtype(_operation(scene))


def custom_function_state(scene: Scene) -> CustomFunctionState:
    return CustomFunctionState(function_of_node(scene.said.get("node") or ""))


def _dtypes(scene: Scene) -> dict[str, str]:
    """The dtypes that the message names, by group of the signature."""
    named = {group: canonical(scene.said.get(group)) for group in "abc"}
    return {group: dtype for group, dtype in named.items() if dtype is not None}


def _agree(operation: FailedOperation) -> bool:
    """Whether the operands have one dtype, or whether it is not known what was done with them."""
    seen = {operand.dtype for operand in operation.operands}
    return bool(seen) and (len(seen) < 2 or operation.expression is None)


def _operation(scene: Scene, *, written: bool = False) -> FailedOperation:
    """The innermost operation with tensors of the dtypes that the message names. ``written``: it is a write, possibly
    to integers."""
    found, dtypes = scene.found, _dtypes(scene)
    told = set(dtypes.values())
    within = inner(found)
    evaluated = find_operation(within, told)
    naming = Naming(scene.root, found)
    outward = found[: found.index(evaluated.frame) + 1] if evaluated else found
    given = [operand_of(value, naming, outward) for value in (evaluated.values if evaluated else ())]
    operands = [operand for operand in given if operand.dtype in (FLOATING | told if written else FLOATING)]
    missing = (told & FLOATING) - {operand.dtype for operand in operands}
    if operands and missing and evaluated is not None and evaluated.frame.in_torch("nn/modules/rnn.py"):
        operands += own_tensors(within, naming, missing)
    computed = unread(evaluated) if evaluated is not None and not evaluated.frame.library else []
    devices = {operand.device for operand in operands}
    if len(computed) == len(missing) == len(devices) == 1:
        operands.append(FailedOperand(computed[0], missing.pop(), device=devices.pop()))
    thread = crossed_thread(found)
    regions, opaque = autocast_regions([*still_running(scene.exc), *found] if thread is None else found[thread:])
    known = operator(evaluated, within)
    return FailedOperation(
        dtypes=tuple(dtypes.values()),
        operands=tuple(operands or from_message(scene.said, dtypes, written=written)),
        producers=tuple(dict.fromkeys(operand.producer.site for operand in given if operand.producer is not None)),
        op=known.op or scene.said.get("op"),
        expression=ast.unparse(evaluated.node) if evaluated is not None else None,
        custom=known.custom,
        autocast_rule=known.autocast_rule,
        in_place=known.in_place,
        out=known.out,
        regions=tuple(regions),
        opaque_regions=opaque,
        thread=thread is not None or _REPLICA.search(str(scene.exc)) is not None,
        function=custom_function(found, naming),
    )
