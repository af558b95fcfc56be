"""The call of ``autocast`` that failed: what it passed, and the corrected call."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.failure.code import (
    DEPRECATED,
    MISSING,
    assigned_before,
    assignments,
    expressions_at,
    read,
    returned,
    site_in,
)
from ampcheck.failure.frames import Frame, Scene, user_code_first
from ampcheck.trace import AutocastCall, AutocastFault

_PARAMETERS = ("device_type", "dtype", "enabled", "cache_enabled")
_DEPRECATED_PARAMETERS = ("enabled", "dtype", "cache_enabled")


@dataclass
class _Call:
    """A call: its arguments in order by parameter name, each as an expression, and the mapping or ``partial`` that
    holds some of them (``source``)."""

    frame: Frame
    node: ast.Call
    function: Any
    parameters: tuple[str, ...]
    arguments: dict[str, ast.expr] = field(default_factory=dict)
    starred: ast.expr | None = None
    held: Mapping[str, Any] | None = None
    source: str | None = None


class _Fault(NamedTuple):
    """What is wrong with a call, as far as the message says."""

    reason: AutocastFault
    argument: str
    allowed: tuple[str, ...] | None = None
    type: str | None = None
    device: str | None = None


def autocast_call(scene: Scene) -> AutocastCall:
    """The call of ``autocast`` in the frames, and its correction."""
    call = next((call for frame in user_code_first(scene.found) for call in _calls(frame)), None)
    device = _device_type(scene.found, scene.root)
    definition = _definition(call) if call is not None and call.source is not None else None
    fault = _fault(scene.said, call, _entries(definition[1]) if definition else None)
    told = AutocastCall(
        fault.reason,
        fault.argument,
        corrected=f"torch.autocast(device_type={device!r})",
        allowed=fault.allowed,
        type=fault.type,
        device=fault.device,
    )
    if call is None:
        return told
    of_the_call = call.source is None or fault.argument in call.arguments or _only_the_function_is_wrong(call, fault)
    return replace(
        told,
        corrected=_corrected(call, fault, device) if of_the_call else _mapping(call, fault, device, definition),
        replaces="call" if of_the_call else "kwargs",
        call=ast.unparse(call.node),
        site=call.frame.site("raise"),
        value=_value(call, fault.argument),
        deprecated=f"torch.{DEPRECATED[call.function]}.amp.autocast" if call.function in DEPRECATED else None,
        kwargs_variable=call.source,
        kwargs_site=site_in(definition[0], definition[1].lineno) if definition is not None else None,
    )


def _value(call: _Call, argument: str) -> str | None:
    """An argument as written in the call, or in the mapping that holds it."""
    if argument in call.arguments:
        return ast.unparse(call.arguments[argument])
    return _literal(call.held[argument]) if call.held and argument in call.held else None


def _only_the_function_is_wrong(call: _Call, fault: _Fault) -> bool:
    """Whether ``torch.autocast`` takes the arguments unchanged, as in ``torch.cuda.amp.autocast(**kwargs)``."""
    return call.function in DEPRECATED and fault.reason == "device-type-keyword" and call.starred is not None


def _definition(call: _Call) -> tuple[str, ast.expr] | None:
    """Where the mapping (or ``partial``) is defined: its file and expression, if there is exactly one."""
    if isinstance(call.starred, ast.Call):
        file, values = returned(read(call.starred.func, call.frame))
        return (file, values[0]) if len(values) == 1 else None
    settled, value = assigned_before(call.frame, call.source or "")
    if settled and value is not None:
        return call.frame.file, value
    made = [node.value for node in assignments(call.frame, call.source or "") if node.value is not None]
    return (call.frame.file, made[0]) if len(made) == 1 else None


def _fault(said: Mapping[str, str | None], call: _Call | None, entries: Mapping[str, ast.expr] | None) -> _Fault:
    given = {*call.arguments, *(call.held or ()), *(entries or ())} if call else set()
    unexpected = said.get("unexpected")
    deprecated = call is not None and call.function in DEPRECATED
    if unexpected == "device" or (said.get("missing") and "device" in given):
        return _Fault("device-keyword", "device")
    if unexpected == "device_type":
        return _Fault("device-type-keyword", "device_type")
    if unexpected:
        return _Fault("unexpected-keyword", unexpected, allowed=call.parameters if call else _PARAMETERS)
    if said.get("missing"):
        return _Fault("no-device-type", "device_type")
    if kind := said.get("object"):
        return _Fault("device-not-a-string", "device_type", type=kind)
    if kind := said.get("dtype"):
        return _Fault("dtype-not-a-dtype", "dtype", type=kind)
    if said.get("unknown") is not None or said.get("unsupported"):
        return _Fault("unknown-device", "device_type", device=said.get("unknown") or None)
    return _Fault("wrong-arguments", "enabled" if deprecated else "device_type")


def _calls(frame: Frame) -> Iterable[_Call]:
    calls = [one for node in expressions_at(frame) for one in _entered(node) if isinstance(one, ast.Call)]
    # A line can hold several calls: those that look like autocast come first, and any other must be the only one.
    named = [node for node in calls if "autocast" in ast.unparse(node.func) or _is_autocast(read(node.func, frame))]
    for node in named or (calls if len(calls) == 1 else ()):
        yield _call_of(frame, node)


def _entered(node: ast.AST) -> Sequence[ast.AST]:
    """What a ``with`` statement enters, because entering it may have failed; else ``node`` itself."""
    return [item.context_expr for item in node.items] if isinstance(node, (ast.With, ast.AsyncWith)) else [node]


def _is_autocast(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return isinstance(function, type) and issubclass(function, torch.autocast)


def _call_of(frame: Frame, node: ast.Call) -> _Call:
    function = read(node.func, frame)
    held: dict[str, Any] = {}
    source = None
    filled = 0
    while isinstance(function, functools.partial):
        held = {**function.keywords, **held}
        filled += len(function.args)
        function, source = function.func, ast.unparse(node.func)
    call = _Call(frame, node, function, _parameters(function))
    call.arguments.update(zip(call.parameters[filled:], node.args, strict=False))
    for keyword in node.keywords:
        if keyword.arg is not None:
            call.arguments[keyword.arg] = keyword.value
            continue
        call.starred, source = keyword.value, ast.unparse(keyword.value)
        value = read(keyword.value, frame)
        if isinstance(value, dict):
            held.update(value)
    call.held, call.source = held, source
    return call


def _parameters(function: Any) -> tuple[str, ...]:
    if function in DEPRECATED:
        return _DEPRECATED_PARAMETERS
    if function is MISSING or _is_autocast(function):
        return _PARAMETERS
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return _PARAMETERS


def _device_type(found: Sequence[Frame], model: nn.Module | None) -> str:
    """The device type of the model, else that of the tensors in the frames."""
    tensors: list[torch.Tensor] = []
    if model is not None:
        tensors += [*model.parameters()][:1]
    tensors += [value for frame in reversed(found) for value in frame.names.values() if isinstance(value, torch.Tensor)]
    return tensors[0].device.type if tensors else "cuda"


def _corrected(call: _Call, fault: _Fault, device: str) -> str:
    arguments = _repaired(dict(call.arguments), call, fault, device)
    function: ast.expr = call.node.func
    if call.function in DEPRECATED:
        function = ast.parse("torch.autocast", mode="eval").body
    keywords = [ast.keyword(name, value) for name, value in arguments.items()]
    if call.starred is not None:
        keywords.append(ast.keyword(None, call.starred))
    return ast.unparse(ast.Call(function, [], keywords))


def _repaired(arguments: dict[str, ast.expr], call: _Call, fault: _Fault, device: str) -> dict[str, ast.expr]:
    """``arguments`` with the bad one renamed, replaced, added or dropped."""
    bad = arguments.pop(fault.argument, None)
    if fault.reason == "unexpected-keyword":
        close = difflib.get_close_matches(fault.argument, call.parameters, 1)
        return {**arguments, close[0]: bad} if close and bad is not None else arguments
    if _only_the_function_is_wrong(call, fault) and bad is None:
        return arguments
    if "device_type" not in call.parameters and call.function not in DEPRECATED:
        return arguments
    kept = arguments.pop("device", None)
    meant = None if fault.reason == "unknown-device" else bad or kept
    return {"device_type": _as_string(meant, call.frame, device), **arguments}


def _as_string(node: ast.expr | None, frame: Frame, device: str) -> ast.expr:
    """An expression for the device type that ``node`` means."""
    if node is None:
        return ast.Constant(device)
    value = read(node, frame)
    if isinstance(value, str):
        return node if ":" not in value or not isinstance(node, ast.Constant) else ast.Constant(value.partition(":")[0])
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("device") and len(node.args) >= 1:
        return _as_string(node.args[0], frame, device)
    if isinstance(value, torch.device) or (value is MISSING and ast.unparse(node).endswith("device")):
        return ast.Attribute(node, "type")
    return ast.Constant(device) if value is not MISSING else node


def _mapping(call: _Call, fault: _Fault, device: str, definition: tuple[str, ast.expr] | None) -> str:
    """The mapping (or ``partial``) that held the bad argument, corrected: as written in the source if that is found,
    else with the values that it had."""
    entries = _entries(definition[1]) if definition else None
    if entries is None:
        entries = {name: _expression(value) for name, value in (call.held or {}).items()}
    repaired = _repaired(entries, call, fault, device)
    if call.starred is None:
        return f"{call.source} = functools.partial(torch.autocast, {_keywords(repaired)})"
    target = "return" if isinstance(call.starred, ast.Call) else f"{call.source} ="
    if definition and isinstance(definition[1], ast.Call):
        return f"{target} dict({_keywords(repaired)})"
    return f"{target} {ast.unparse(ast.Dict([ast.Constant(name) for name in repaired], [*repaired.values()]))}"


def _entries(node: ast.expr) -> dict[str, ast.expr] | None:
    """The entries of a dict display, a ``dict(...)`` or a ``partial(autocast, ...)``, or ``None`` for anything else."""
    if isinstance(node, ast.Dict):
        items = zip(node.keys, node.values, strict=True)
        named = {
            key.value: value for key, value in items if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        return named if len(named) == len(node.keys) else None
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("dict", "partial"):
        named = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        plain = len(named) == len(node.keywords) and len(node.args) == ("partial" in ast.unparse(node.func))
        return named if plain else None
    return None


def _keywords(entries: Mapping[str, ast.expr]) -> str:
    return ", ".join(f"{name}={ast.unparse(value)}" for name, value in entries.items())


def _expression(value: Any) -> ast.expr:
    return ast.parse(_literal(value), mode="eval").body


def _literal(value: Any) -> str:
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    return repr(value) if isinstance(value, (str, int, float, bool, torch.dtype, type(None))) else "..."
