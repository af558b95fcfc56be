"""From an exception to a ``Failure``: kind, parsed fields, frames. What it returns holds no tensor and no frame."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.failure.autocast_call import autocast_argument
from ampcheck.failure.dtypes import FLOATING, canonical
from ampcheck.failure.frames import Place, callers, chain, inner, phase_of, places, root_of, sites
from ampcheck.failure.operands import Naming, describe, find_operation, from_message, own_tensors
from ampcheck.failure.scaling import low_precision_gradients, missing_gradients, scaler_argument, stage
from ampcheck.failure.signatures import OF_THE_GRAPH, SIGNATURES, Signature
from ampcheck.failure.surroundings import (
    autocast_regions,
    crossed_thread,
    custom_function,
    function_of_node,
    operator,
)
from ampcheck.observe.walk import module_names, unwrapped
from ampcheck.trace import Failure

__all__ = ["OF_THE_GRAPH", "SIGNATURES", "Signature", "examine"]

# Not failures of the numbers, whatever else the program was handling when they came.
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.cuda.OutOfMemoryError)


def examine(exc: BaseException, *, model: nn.Module | None, phase: str, step: int | None) -> Failure:
    """Take ``exc`` apart. ``model`` is the model that trains, if known; ``phase`` and ``step`` say where the host saw
    the exception, and the frames may say it more exactly. Never raises."""
    try:
        return _examine(exc, model, phase, step)
    except Exception as error:  # noqa: BLE001 (the user's exception must come through whatever happens here)
        fields = {"internal_error": f"{type(error).__name__}: {error}"}
        return Failure(type(exc).__name__, _message(exc), phase, step, fields=fields)


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 (a user's __str__ may fail)
        return ""


def _examine(exc: BaseException, model: nn.Module | None, phase: str, step: int | None) -> Failure:
    links = tuple((type(link).__name__, _message(link)) for link, _ in chain(exc))
    model = unwrapped(model) if model is not None else None
    told = _recognise(exc, model)
    subject = told[0] if told else exc
    found = places(subject, model)
    root = root_of(found, model)
    name, module_type = _module(found, root)
    fields: dict[str, Any] = {"module_type": module_type} if module_type else {}
    kind = None
    if told:
        kind, facts = _facts(told[1].kind, told[2].groupdict(), _Scene(subject, found, root))
        fields.update(facts)
    function = fields.get("function")
    if name is None and function is not None and function.get("module"):
        # In backward no frame is the module's: it is known by the tensors that it handed its function.
        name = function["module"]
    return Failure(
        type=type(exc).__name__,
        message=_message(exc),
        phase=phase_of(found, phase),
        step=step,
        kind=kind,
        chain=links,
        sites=sites(found),
        module=name,
        fields=fields,
    )


def _recognise(exc: BaseException, model: nn.Module | None) -> tuple[BaseException, Signature, re.Match[str]] | None:
    """The innermost exception of the chain that is known, with its signature. What was merely being handled when
    another known failure came is not its cause."""
    found: tuple[BaseException, Signature, re.Match[str]] | None = None
    for link, explicit in chain(exc):
        if isinstance(link, _NOT_OURS):
            return found
        if found is not None and not explicit:
            return found
        text, through = _message(link), None
        for signature in SIGNATURES:
            match = signature.pattern.search(text) if isinstance(link, signature.types) else None
            if match is None:
                continue
            if signature.frame is not None:
                through = through if through is not None else places(link, model)
                if not any(place.in_torch(signature.frame) for place in through):
                    continue
            found = link, signature, match
            break
    return found


def _module(found: Sequence[Place], root: nn.Module | None) -> tuple[str | None, str | None]:
    """Qualified name and type of the innermost module in the frames."""
    module = next((place.module for place in reversed(inner(found)) if place.module is not None), None)
    if module is None:
        return None, None
    # What fails in evaluation may be a copy of the model that trains.
    roots = [root, *(place.module for place in found)]
    names = (module_names(one).get(id(module)) for one in roots if one is not None)
    return next((name for name in names if name is not None), None), type(module).__name__


class _Scene(NamedTuple):
    """What an exception is examined with."""

    exc: BaseException
    found: tuple[Place, ...]
    root: nn.Module | None


def _facts(kind: str, match: dict[str, str | None], scene: _Scene) -> tuple[str | None, dict[str, Any]]:
    """The fields of a failure of ``kind``; the kind becomes ``None`` where the frames show it is another fault that
    PyTorch words alike."""
    found, root = scene.found, scene.root
    if kind == "autocast-bad-argument":
        return kind, autocast_argument(found, match, root)
    if kind == "unscale-low-precision-gradients":
        return kind, low_precision_gradients(found, root, (*callers(scene.exc), *found))
    if kind == "no-inf-checks":
        return kind, missing_gradients(found, root)
    if kind == "scaler-out-of-order":
        return kind, {"reason": next(name.replace("_", "-") for name, text in match.items() if text), **stage(found)}
    if kind == "scaler-bad-argument":
        return kind, {"unexpected": match["unexpected"]} if match.get("unexpected") else scaler_argument(found)
    if kind == "custom-function-state":
        return kind, {"function": function_of_node(match["node"] or "")}
    if kind in ("dtype-mismatch", "in-place-dtype", "op-not-implemented", "no-numpy-dtype"):
        return _dtype_facts(kind, match, scene)
    fields: dict[str, Any] = {name: value for name, value in match.items() if value is not None}
    if kind == "saved-tensor-modified":
        fields["dtype"] = canonical(fields.pop("a", None))
        if "shape" in fields:
            fields["shape"] = [int(size) for size in fields["shape"].split(",") if size.strip()]
    numbers = ("output", "version_found", "version_expected", "element")
    return kind, {name: int(value) if name in numbers else value for name, value in fields.items()}


def _dtype_facts(kind: str, match: dict[str, str | None], scene: _Scene) -> tuple[str | None, dict[str, Any]]:
    found = scene.found
    dtypes = {group: canonical(match.get(group)) for group in "abc"}
    told = {dtype for dtype in dtypes.values() if dtype is not None}
    if kind == "dtype-mismatch" and told and ((len(told) == 1 and dtypes["b"] and dtypes["a"]) or told - FLOATING):
        # The same dtype twice is a mix-up of devices; integers are no matter of precision.
        return None, {}
    within = inner(found)
    # A write may be to integers.
    operation = find_operation(within, told & FLOATING if kind == "dtype-mismatch" else told)
    naming = Naming(scene.root, found)
    outward = found[: found.index(operation.place) + 1] if operation else found
    described = [describe(value, naming, outward) for value in (operation.values if operation else ())]
    relevant = FLOATING | told if kind == "in-place-dtype" else FLOATING
    operands = [fact for fact, _ in described if fact["dtype"] in relevant]
    missing = (told & FLOATING) - {operand["dtype"] for operand in operands}
    if operands and missing and operation is not None and operation.place.in_torch("nn/modules/rnn.py"):
        operands += own_tensors(within, naming, missing)
    if kind in ("dtype-mismatch", "in-place-dtype") and not told:
        seen = {operand["dtype"] for operand in operands}
        if operands and (len(seen) < 2 or operation is None) and not match.get("promotes"):
            return None, {}
    thread = crossed_thread(found)
    around = [*callers(scene.exc), *found] if thread is None else found[thread:]
    regions, opaque = autocast_regions(around)
    fields: dict[str, Any] = {
        "dtypes": [dtype for group in "abc" if (dtype := dtypes[group]) is not None],
        "operands": operands or from_message(match, dtypes, written=kind == "in-place-dtype"),
        "producers": tuple(dict.fromkeys(site for _, site in described if site is not None)),
        "regions": regions,
        "opaque_regions": opaque,
        "thread": thread is not None or _REPLICA.search(_message(scene.exc)) is not None,
        **operator(operation, within),
    }
    if match.get("promotes"):
        fields["promotes"] = True
    if fields.get("op") is None and match.get("op"):
        fields["op"] = match["op"]
    if (fields.get("op") or "").endswith("lerp_"):
        kind = "in-place-dtype"
    if operation is not None:
        fields["expression"] = ast.unparse(operation.node)
    function = custom_function(found, naming)
    if function is not None:
        fields["function"] = function
    return kind, fields


_REPLICA = re.compile(r"^Caught \w+ in replica \d+ on device")
