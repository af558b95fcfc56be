"""The call of ``autocast`` that failed: what was passed, and the call that should have been written."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from ampcheck.failure.frames import Place, user_code_first

_PARAMETERS = ("device_type", "dtype", "enabled", "cache_enabled")
_DEPRECATED_PARAMETERS = ("enabled", "dtype", "cache_enabled")


@dataclass
class _Call:
    """A call: its arguments in order by parameter name, each as an expression, and the mapping or ``partial`` that
    holds some of them (``source``)."""

    place: Place
    node: ast.Call
    function: Any
    parameters: tuple[str, ...]
    arguments: dict[str, ast.expr] = field(default_factory=dict)
    starred: ast.expr | None = None
    held: Mapping[str, Any] | None = None
    source: str | None = None


def autocast_argument(
    found: Sequence[Place], match: Mapping[str, str | None], model: nn.Module | None
) -> dict[str, Any]:
    """Facts about the failed call: ``reason``, ``argument``, ``value``, ``call`` and its ``site``; ``kwargs_variable``
    and ``kwargs_site`` where arguments came out of a mapping; ``corrected``, what to write instead, in place of
    ``replaces`` (``"call"`` or ``"kwargs"``)."""
    call = next((call for place in user_code_first(found) for call in _calls(place)), None)
    device = _device_type(found, model)
    definition = _definition(call) if call is not None and call.source is not None else None
    facts = _reason(match, call, _entries(definition[1]) if definition else None)
    if call is None:
        return {**facts, "replaces": "call", "corrected": f"torch.autocast(device_type={device!r})"}
    facts["call"] = ast.unparse(call.node)
    facts["site"] = call.place.site("raise")
    if call.function in DEPRECATED:
        facts["deprecated"] = f"torch.{DEPRECATED[call.function]}.amp.autocast"
    if call.source is not None:
        facts["kwargs_variable"] = call.source
    if definition is not None:
        facts["kwargs_site"] = site_in(definition[0], definition[1].lineno)
    argument = facts["argument"]
    if argument in call.arguments:
        facts["value"] = ast.unparse(call.arguments[argument])
    elif call.held and argument in call.held:
        facts["value"] = _literal(call.held[argument])
    if call.source is None or argument in call.arguments or _only_the_function_is_wrong(call, facts):
        facts["replaces"], facts["corrected"] = "call", _corrected(call, facts, device)
    else:
        facts["replaces"], facts["corrected"] = "kwargs", _corrected_mapping(call, facts, device, definition)
    return facts


def _only_the_function_is_wrong(call: _Call, facts: Mapping[str, Any]) -> bool:
    """``torch.cuda.amp.autocast(**kwargs)`` with arguments that ``torch.autocast`` takes as they are."""
    return call.function in DEPRECATED and facts["reason"] == "device-type-keyword" and call.starred is not None


def _definition(call: _Call) -> tuple[str, ast.expr] | None:
    """Where the mapping (or ``partial``) was written down: its file and expression, where there is but one."""
    if isinstance(call.starred, ast.Call):
        file, values = returned(read(call.starred.func, call.place))
        return (file, values[0]) if len(values) == 1 else None
    settled, value = assigned_before(call.place, call.source or "")
    if settled and value is not None:
        return call.place.file, value
    made = [node.value for node in assignments(call.place, call.source or "") if node.value is not None]
    return (call.place.file, made[0]) if len(made) == 1 else None


def _reason(
    match: Mapping[str, str | None], call: _Call | None, entries: Mapping[str, ast.expr] | None
) -> dict[str, Any]:
    given = {*call.arguments, *(call.held or ()), *(entries or ())} if call else set()
    unexpected = match.get("unexpected")
    deprecated = call is not None and call.function in DEPRECATED
    if unexpected == "device" or (match.get("missing") and "device" in given):
        return {"reason": "device-keyword", "argument": "device"}
    if unexpected == "device_type":
        return {"reason": "device-type-keyword", "argument": "device_type"}
    if unexpected:
        allowed = call.parameters if call else _PARAMETERS
        return {"reason": "unexpected-keyword", "argument": unexpected, "allowed": list(allowed)}
    if match.get("missing"):
        return {"reason": "no-device-type", "argument": "device_type"}
    if kind := match.get("object"):
        return {"reason": "device-not-a-string", "argument": "device_type", "type": kind}
    if kind := match.get("dtype"):
        return {"reason": "dtype-not-a-dtype", "argument": "dtype", "type": kind}
    if match.get("unknown") is not None or match.get("unsupported"):
        facts = {"reason": "unknown-device", "argument": "device_type"}
        return {**facts, "device": match["unknown"]} if match.get("unknown") else facts
    return {"reason": "wrong-arguments", "argument": "enabled" if deprecated else "device_type"}


def _calls(place: Place) -> Iterable[_Call]:
    calls = [node for node in expressions_at(place) if isinstance(node, ast.Call)]
    # A line can hold several calls; the autocast-like ones come first, and one with other names must be alone.
    named = [node for node in calls if "autocast" in ast.unparse(node.func) or _is_autocast(read(node.func, place))]
    for node in named or (calls if len(calls) == 1 else ()):
        yield _describe(place, node)


def _is_autocast(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return isinstance(function, type) and issubclass(function, torch.autocast)


def _describe(place: Place, node: ast.Call) -> _Call:
    function = read(node.func, place)
    held: dict[str, Any] = {}
    source = None
    filled = 0
    while isinstance(function, functools.partial):
        held = {**function.keywords, **held}
        filled += len(function.args)
        function, source = function.func, ast.unparse(node.func)
    call = _Call(place, node, function, _parameters(function))
    call.arguments.update(zip(call.parameters[filled:], node.args, strict=False))
    for keyword in node.keywords:
        if keyword.arg is not None:
            call.arguments[keyword.arg] = keyword.value
            continue
        call.starred, source = keyword.value, ast.unparse(keyword.value)
        value = read(keyword.value, place)
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


def _device_type(found: Sequence[Place], model: nn.Module | None) -> str:
    """Where the model lies, else where the tensors in the frames do."""
    tensors: list[torch.Tensor] = []
    if model is not None:
        tensors += [*model.parameters()][:1]
    tensors += [value for place in reversed(found) for value in place.names.values() if isinstance(value, torch.Tensor)]
    return tensors[0].device.type if tensors else "cuda"


def _corrected(call: _Call, facts: Mapping[str, Any], device: str) -> str:
    arguments = _repaired(dict(call.arguments), call, facts, device)
    function: ast.expr = call.node.func
    if call.function in DEPRECATED:
        function = ast.parse("torch.autocast", mode="eval").body
    keywords = [ast.keyword(name, value) for name, value in arguments.items()]
    if call.starred is not None:
        keywords.append(ast.keyword(None, call.starred))
    return ast.unparse(ast.Call(function, [], keywords))


def _repaired(
    arguments: dict[str, ast.expr], call: _Call, facts: Mapping[str, Any], device: str
) -> dict[str, ast.expr]:
    """``arguments`` with the bad one renamed, replaced, added or dropped."""
    argument, reason = facts["argument"], facts["reason"]
    bad = arguments.pop(argument, None)
    if reason == "unexpected-keyword":
        close = difflib.get_close_matches(argument, call.parameters, 1)
        return {**arguments, close[0]: bad} if close and bad is not None else arguments
    if _only_the_function_is_wrong(call, facts) and bad is None:
        return arguments
    if "device_type" not in call.parameters and call.function not in DEPRECATED:
        return arguments
    kept = arguments.pop("device", None)
    meant = None if reason == "unknown-device" else bad or kept
    return {"device_type": _as_string(meant, call.place, device), **arguments}


def _as_string(node: ast.expr | None, place: Place, device: str) -> ast.expr:
    """An expression for the device type that ``node`` means."""
    if node is None:
        return ast.Constant(device)
    value = read(node, place)
    if isinstance(value, str):
        return node if ":" not in value or not isinstance(node, ast.Constant) else ast.Constant(value.partition(":")[0])
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("device") and len(node.args) >= 1:
        return _as_string(node.args[0], place, device)
    if isinstance(value, torch.device) or (value is MISSING and ast.unparse(node).endswith("device")):
        return ast.Attribute(node, "type")
    return ast.Constant(device) if value is not MISSING else node


def _corrected_mapping(
    call: _Call, facts: Mapping[str, Any], device: str, definition: tuple[str, ast.expr] | None
) -> str:
    """The corrected contents of the mapping (or ``partial``) that the bad argument came out of: as its author wrote
    it where that is found, else with the values it had."""
    entries = _entries(definition[1]) if definition else None
    if entries is None:
        entries = {name: _expression(value) for name, value in (call.held or {}).items()}
    repaired = _repaired(entries, call, facts, device)
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
