"""What stood around the operation that failed: autocast regions, custom functions, other threads, and the
dispatcher's rule for the op."""

from __future__ import annotations

import ast
import contextlib
import functools
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch.autograd import Function

from ampcheck.failure.code import DEPRECATED, MISSING, definition_of, parents, read, site_in
from ampcheck.failure.frames import Place
from ampcheck.failure.operands import Naming, Operation
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import decorator_site, is_library, is_torch
from ampcheck.trace import Site

# Context managers that leave autocast as it is.
_PLAIN = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autograd.set_detect_anomaly,
    torch.autograd.detect_anomaly,
    torch.autograd.graph.saved_tensors_hooks,
    torch.profiler.record_function,
    contextlib.nullcontext,
    contextlib.suppress,
    warnings.catch_warnings,
    open,
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def autocast_regions(found: Sequence[Place]) -> tuple[list[dict[str, Any]], bool]:
    """The autocast regions whose ``with`` block (or decorator) holds the crash, innermost first: ``device_type``,
    ``enabled`` (``None``: the source does not tell) and ``site``. The flag says whether a context manager was among
    them of which the source does not tell what it does."""
    regions: list[dict[str, Any]] = []
    opaque = False
    for place in reversed(found):
        if place.in_torch("amp/autocast_mode.py"):
            made = place.names.get("autocast_instance")
            if isinstance(made, torch.autocast):
                site = decorator_site(place.names.get("func")) or place.site("call")
                regions.append(_of_instance(made, site))
            continue
        if is_torch(place.file):
            continue
        for item, line in _items_around(place):
            region = _region(item, place, line)
            if region is None:
                opaque = opaque or not _leaves_autocast_alone(item, place)
            else:
                regions.append(region)
    return regions, opaque


def _items_around(place: Place) -> Iterator[tuple[ast.expr, int]]:
    """The context expressions of the ``with`` statements whose body holds the line, innermost first."""
    above = parents(place.file)
    holding = [
        node
        for node in above
        if isinstance(node, (ast.With, ast.AsyncWith))
        and node.body[0].lineno <= place.line <= (node.end_lineno or 0)
        and _same_function(node, place, above)
    ]
    for node in sorted(holding, key=lambda node: -node.lineno):
        for item in reversed(node.items):
            yield item.context_expr, item.context_expr.lineno


def _same_function(node: ast.AST, place: Place, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``node`` is a statement of the function that ``place`` is a frame of, rather than around it."""
    name = place.function.rpartition(".")[2]
    holder = node
    while not isinstance(holder, (*_FUNCTIONS, ast.Module)) and holder in above:
        holder = above[holder]
    nested = any(
        isinstance(one, _FUNCTIONS) and one.name == name and one.lineno <= place.line <= (one.end_lineno or 0)
        for one in ast.walk(node)
    )
    return getattr(holder, "name", "<module>") == name and not nested


def _region(item: ast.expr, place: Place, line: int) -> dict[str, Any] | None:
    site = site_in(place.file, line)
    if not isinstance(item, ast.Call):
        made = read(item, place)
        return _of_instance(made, site) if isinstance(made, torch.autocast) else None
    function: Any = read(item.func, place)
    held: dict[str, Any] = {}
    positional: list[Any] = []
    while isinstance(function, functools.partial):
        held, positional = {**function.keywords, **held}, [*function.args, *positional]
        function = function.func
    if not (isinstance(function, type) and issubclass(function, torch.autocast)):
        return None
    names = ["enabled", "dtype", "cache_enabled"] if function in DEPRECATED else ["device_type", "dtype", "enabled"]
    values = dict(zip(names, [*positional, *(read(argument, place) for argument in item.args)], strict=False))
    values.update(held)
    complete = True
    for keyword in item.keywords:
        value = read(keyword.value, place)
        if keyword.arg is not None:
            values[keyword.arg] = value
        elif isinstance(value, dict):
            values.update(value)
        else:
            complete = False
    enabled = values.get("enabled", True if complete else MISSING)
    device = DEPRECATED.get(function, values.get("device_type", MISSING))
    return {
        "device_type": device.partition(":")[0] if isinstance(device, str) else None,
        "enabled": bool(enabled) if enabled is not MISSING else None,
        "site": site,
    }


def _of_instance(made: torch.autocast, site: Site) -> dict[str, Any]:
    return {"device_type": made.device.partition(":")[0], "enabled": made._enabled, "site": site}


def _leaves_autocast_alone(item: ast.expr, place: Place) -> bool:
    made = read(item.func if isinstance(item, ast.Call) else item, place)
    owner = made if callable(made) else type(made)
    module = getattr(owner, "__module__", "") or ""
    return any(owner is plain for plain in _PLAIN) or module.partition(".")[0] == "ampcheck"


def custom_function(found: Sequence[Place], naming: Naming) -> dict[str, Any] | None:
    """The innermost ``autograd.Function`` whose ``forward`` or ``backward`` the crash is in: ``name``, ``method``,
    whether ``custom_fwd`` decorates it, its ``cast_inputs``, the ``site`` of the method, and the ``module`` whose
    parameters or buffers it works on, if it is one."""
    codes = {
        code: (function, method)
        for function in _functions(Function)
        for method in ("forward", "backward")
        if not is_torch(_source_of(function, method)) and (code := _code_of(function, method)) is not None
    }
    for index in range(len(found) - 1, -1, -1):
        place = found[index]
        held = next(((code, *codes[code]) for code in codes if _is_code(code, place)), None)
        if held is None:
            continue
        code, function, method = held
        # Classes may share a method's code; the context knows which of them was applied.
        function = getattr(place.names.get(code.co_varnames[0]), "_forward_cls", function)
        decorated = index > 0 and found[index - 1].in_torch("amp/autocast_mode.py")
        cast = found[index - 1].names.get("cast_inputs") if decorated else None
        tensors = [value for value in place.names.values() if isinstance(value, torch.Tensor)]
        owners = {name.rpartition(".")[0] for tensor in tensors if (name := naming.owned(tensor)) is not None}
        return {
            "name": function.__name__,
            "method": method,
            "custom_fwd": _is_decorated(function, "forward"),
            "custom_bwd": _is_decorated(function, "backward"),
            "cast_inputs": dtype_name(cast) if isinstance(cast, torch.dtype) else None,
            "device_types": sorted({tensor.device.type for tensor in tensors}),
            "site": _defined(code),
            "module": owners.pop() if len(owners) == 1 else None,
        }
    return None


def function_of_node(node: str) -> dict[str, Any]:
    """The ``autograd.Function`` whose backward node is called ``<node>Backward``."""
    for function in _functions(Function):
        code = _code_of(function, "forward")
        if function.__name__ == node and code is not None and not is_torch(code.co_filename):
            return {
                "name": node,
                "custom_fwd": _is_decorated(function, "forward"),
                "custom_bwd": _is_decorated(function, "backward"),
                "setup_context": "setup_context" in vars(function),
                "site": _defined(code),
            }
    return {"name": node}


def _functions(base: type) -> Iterator[type]:
    derived: list[type] = base.__subclasses__()
    for function in derived:
        yield function
        yield from _functions(function)


def _code_of(function: type, method: str) -> types.CodeType | None:
    own = vars(function).get(method)
    inner: Any = getattr(own, "__func__", own)
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    return getattr(inner, "__code__", None)


def _defined(code: types.CodeType) -> Site:
    definition = definition_of(code)
    return site_in(code.co_filename, definition.lineno if definition is not None else code.co_firstlineno)


def _source_of(function: type, method: str) -> str:
    code = _code_of(function, method)
    return code.co_filename if code is not None else ""


def _is_code(code: types.CodeType, place: Place) -> bool:
    if code.co_filename != place.file or code.co_name != place.function.rpartition(".")[2]:
        return False
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return code.co_firstlineno <= place.line <= max(lines, default=0)


def _is_decorated(function: type, method: str) -> bool:
    own = vars(function).get(method)
    inner = getattr(own, "__func__", own)
    code = getattr(inner, "__code__", None)
    return hasattr(inner, "__wrapped__") and code is not None and code.co_filename.endswith("autocast_mode.py")


def crossed_thread(found: Sequence[Place]) -> int | None:
    """The index of the last frame with which a thread began, or ``None``."""
    for index in range(len(found) - 1, -1, -1):
        name = PurePath(found[index].file).as_posix()
        if is_library(found[index].file) and name.endswith(("/threading.py", "/concurrent/futures/thread.py")):
            return index
    return None


def operator(operation: Operation | None, found: Sequence[Place]) -> dict[str, Any]:
    """The op that failed: ``op`` (``aten::conv2d``), ``custom`` (not PyTorch's own), ``autocast_rule`` (whether the
    dispatcher has one for the operands' device; ``None``: not to be told), ``in_place``, ``out``."""
    device = next((value.device.partition(":")[0] for value in operation.values), "") if operation else ""
    key = _AUTOCAST_KEYS.get(device)
    for place in reversed(found):
        if isinstance(place.receiver, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _described(_packet(place.receiver), key)
    if operation is None:
        return {}
    node, place = operation.node, operation.place
    if isinstance(node, ast.BinOp):
        return _described(f"aten::{_operator_name(node.op)}", key)
    if isinstance(node, ast.AugAssign):
        return _described(f"aten::{_operator_name(node.op)}_", key) | {"in_place": True}
    if not isinstance(node, ast.Call):
        return {"op": "aten::index_put_", "custom": False, "autocast_rule": False, "in_place": True}
    function = read(node.func, place)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(function, "__name__", "")
    facts: dict[str, Any] = {}
    if any(keyword.arg == "out" for keyword in node.keywords):
        facts["out"] = True
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return facts | _described(_packet(function), key)
    if isinstance(function, types.BuiltinFunctionType) and not _is_torchs(function):
        name = f"{function.__module__}.{function.__name__}"
        return facts | {"op": name, "custom": True, "autocast_rule": False, "in_place": False}
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "_VF":
        return facts | _described(f"aten::{name}", key)
    receiver = isinstance(node.func, ast.Attribute) and (
        any(value.role == "self" for value in operation.values)
        or (function is MISSING and isinstance(node.func.value, ast.Call) and hasattr(torch.Tensor, name))
    )
    if receiver or isinstance(function, types.BuiltinFunctionType):
        return facts | _described(f"aten::{name}", key)
    return facts


def _operator_name(operator: ast.operator) -> str:
    name = type(operator).__name__
    return {"MatMult": "matmul", "Mult": "mul"}.get(name, name.lower())


def _is_torchs(function: types.BuiltinFunctionType) -> bool:
    owner = getattr(function, "__module__", None) or getattr(type(function.__self__), "__module__", "")
    return owner is None or owner.partition(".")[0] in ("torch", "builtins", "_VF")


def _packet(op: Any) -> str:
    return str(op._qualified_op_name if isinstance(op, torch._ops.OpOverloadPacket) else op._name.partition(".")[0])


def _described(qualified: str, key: str | None) -> dict[str, Any]:
    namespace, _, name = qualified.partition("::")
    return {
        "op": qualified,
        "custom": namespace not in ("aten", "prims", "prim"),
        "autocast_rule": _has_rule(namespace, name, key),
        "in_place": name.endswith("_") and not name.endswith("__"),
    }


def _has_rule(namespace: str, name: str, key: str | None) -> bool | None:
    packet = getattr(getattr(torch.ops, namespace), name, None) if name and key else None
    if packet is None or key is None:
        return None
    overloads = [packet._qualified_op_name + ("" if one == "default" else f".{one}") for one in packet.overloads()]
    try:
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(overload, key) for overload in overloads)
    except RuntimeError:
        return None
