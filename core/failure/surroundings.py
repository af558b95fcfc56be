"""What surrounded the failed operation: autocast regions, custom functions, other threads, and the dispatcher's rule
for the op."""

from __future__ import annotations

import ast
import contextlib
import functools
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import Function

from ampcheck.failure.code import DEPRECATED, MISSING, definition_of, parents, read, site_in
from ampcheck.failure.frames import Frame
from ampcheck.failure.operands import Naming, Operation
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import decorator_site, is_library, is_torch
from ampcheck.trace import CustomFunction, Site, SourceRegion

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
_METHODS: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}


def autocast_regions(found: Sequence[Frame]) -> tuple[list[SourceRegion], bool]:
    """The autocast regions whose ``with`` block (or decorator) contains the crash, innermost first. The flag says
    whether there was also a context manager whose effect on autocast the source does not show."""
    regions: list[SourceRegion] = []
    opaque = False
    for frame in reversed(found):
        if frame.in_torch("amp/autocast_mode.py"):
            made = frame.names.get("autocast_instance")
            if isinstance(made, torch.autocast):
                site = decorator_site(frame.names.get("func")) or frame.site("call")
                regions.append(_of_instance(made, site))
            continue
        if is_torch(frame.file):
            continue
        for item, line in _items_around(frame):
            region = _region(item, frame, line)
            if region is None:
                opaque = opaque or not _leaves_autocast_alone(item, frame)
            else:
                regions.append(region)
    return regions, opaque


def _items_around(frame: Frame) -> Iterator[tuple[ast.expr, int]]:
    """The context expressions of the ``with`` statements whose body contains the line, innermost first."""
    above = parents(frame.file)
    holding = [
        node
        for node in above
        if isinstance(node, (ast.With, ast.AsyncWith))
        and node.body[0].lineno <= frame.line <= (node.end_lineno or 0)
        and _same_function(node, frame, above)
    ]
    for node in sorted(holding, key=lambda node: -node.lineno):
        for item in reversed(node.items):
            yield item.context_expr, item.context_expr.lineno


def _same_function(node: ast.AST, frame: Frame, above: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``node`` is a statement inside the function that ``frame`` runs, not around it."""
    name = frame.function.rpartition(".")[2]
    holder = node
    while not isinstance(holder, (*_FUNCTIONS, ast.Module)) and holder in above:
        holder = above[holder]
    nested = any(
        isinstance(one, _FUNCTIONS) and one.name == name and one.lineno <= frame.line <= (one.end_lineno or 0)
        for one in ast.walk(node)
    )
    return getattr(holder, "name", "<module>") == name and not nested


def _region(item: ast.expr, frame: Frame, line: int) -> SourceRegion | None:
    site = site_in(frame.file, line)
    if not isinstance(item, ast.Call):
        made = read(item, frame)
        return _of_instance(made, site) if isinstance(made, torch.autocast) else None
    function: Any = read(item.func, frame)
    held: dict[str, Any] = {}
    positional: list[Any] = []
    while isinstance(function, functools.partial):
        held, positional = {**function.keywords, **held}, [*function.args, *positional]
        function = function.func
    if not (isinstance(function, type) and issubclass(function, torch.autocast)):
        return None
    names = ["enabled", "dtype", "cache_enabled"] if function in DEPRECATED else ["device_type", "dtype", "enabled"]
    values = dict(zip(names, [*positional, *(read(argument, frame) for argument in item.args)], strict=False))
    values.update(held)
    complete = True
    for keyword in item.keywords:
        value = read(keyword.value, frame)
        if keyword.arg is not None:
            values[keyword.arg] = value
        elif isinstance(value, dict):
            values.update(value)
        else:
            complete = False
    enabled = values.get("enabled", True if complete else MISSING)
    device = DEPRECATED.get(function, values.get("device_type", MISSING))
    return SourceRegion(
        device_type=device.partition(":")[0] if isinstance(device, str) else None,
        enabled=bool(enabled) if enabled is not MISSING else None,
        site=site,
    )


def _of_instance(made: torch.autocast, site: Site) -> SourceRegion:
    return SourceRegion(made.device.partition(":")[0], made._enabled, site)


def _leaves_autocast_alone(item: ast.expr, frame: Frame) -> bool:
    made = read(item.func if isinstance(item, ast.Call) else item, frame)
    owner = made if callable(made) else type(made)
    module = getattr(owner, "__module__", "") or ""
    return any(owner is plain for plain in _PLAIN) or module.partition(".")[0] == "ampcheck"


def custom_function(found: Sequence[Frame], naming: Naming) -> CustomFunction | None:
    """The innermost ``autograd.Function`` with the crash in its ``forward`` or ``backward``."""
    codes = {
        code: (function, method)
        for function in _functions(Function)
        for method in _METHODS
        if not is_torch(_source_of(function, method)) and (code := _code_of(function, method)) is not None
    }
    for index in range(len(found) - 1, -1, -1):
        frame = found[index]
        held = next(((code, *codes[code]) for code in codes if _is_code(code, frame)), None)
        if held is None:
            continue
        code, function, method = held
        # Classes may share a method's code; the context knows which class was applied.
        function = getattr(frame.names.get(code.co_varnames[0]), "_forward_cls", function)
        decorated = index > 0 and found[index - 1].in_torch("amp/autocast_mode.py")
        cast = found[index - 1].names.get("cast_inputs") if decorated else None
        tensors = [value for value in frame.names.values() if isinstance(value, torch.Tensor)]
        owners = {name.rpartition(".")[0] for tensor in tensors if (name := naming.owned(tensor)) is not None}
        return CustomFunction(
            name=function.__name__,
            method=method,
            site=_defined(code),
            custom_fwd=_is_decorated(function, "forward"),
            custom_bwd=_is_decorated(function, "backward"),
            cast_inputs=dtype_name(cast) if isinstance(cast, torch.dtype) else None,
            device_types=tuple(sorted({tensor.device.type for tensor in tensors})),
            module=owners.pop() if len(owners) == 1 else None,
            library=is_library(code.co_filename),
        )
    return None


def function_of_node(node: str) -> CustomFunction:
    """The ``autograd.Function`` whose backward node is called ``<node>Backward``."""
    for function in _functions(Function):
        code = _code_of(function, "forward")
        if function.__name__ == node and code is not None and not is_torch(code.co_filename):
            return CustomFunction(
                name=node,
                site=_defined(code),
                custom_fwd=_is_decorated(function, "forward"),
                custom_bwd=_is_decorated(function, "backward"),
                setup_context="setup_context" in vars(function),
            )
    return CustomFunction(node)


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


def _is_code(code: types.CodeType, frame: Frame) -> bool:
    if code.co_filename != frame.file or code.co_name != frame.function.rpartition(".")[2]:
        return False
    lines = [line for _, _, line in code.co_lines() if line is not None]
    return code.co_firstlineno <= frame.line <= max(lines, default=0)


def _is_decorated(function: type, method: str) -> bool:
    own = vars(function).get(method)
    inner = getattr(own, "__func__", own)
    code = getattr(inner, "__code__", None)
    return hasattr(inner, "__wrapped__") and code is not None and code.co_filename.endswith("autocast_mode.py")


def crossed_thread(found: Sequence[Frame]) -> int | None:
    """The index of the last frame that started a thread, or ``None``."""
    for index in range(len(found) - 1, -1, -1):
        name = PurePath(found[index].file).as_posix()
        if is_library(found[index].file) and name.endswith(("/threading.py", "/concurrent/futures/thread.py")):
            return index
    return None


class Operator(NamedTuple):
    """An op as the dispatcher knows it: its name (``aten::conv2d``), whether it comes from outside PyTorch, whether
    autocast has a rule for it on the operands' device (``None``: unknown), and where it writes to."""

    op: str | None = None
    custom: bool = False
    autocast_rule: bool | None = None
    in_place: bool = False
    out: bool = False


def operator(operation: Operation | None, found: Sequence[Frame]) -> Operator:
    """The op that failed."""
    device = next((value.device.partition(":")[0] for value in operation.values), "") if operation else ""
    key = _AUTOCAST_KEYS.get(device)
    for frame in reversed(found):
        if isinstance(frame.receiver, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _looked_up(_packet(frame.receiver), key)
    if operation is None:
        return Operator()
    node, frame = operation.node, operation.frame
    if isinstance(node, ast.BinOp):
        return _looked_up(f"aten::{_operator_name(node.op)}", key)
    if isinstance(node, ast.AugAssign):
        return _looked_up(f"aten::{_operator_name(node.op)}_", key)
    if not isinstance(node, ast.Call):
        return Operator("aten::index_put_", autocast_rule=False, in_place=True)
    function = read(node.func, frame)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(function, "__name__", "")
    out = any(keyword.arg == "out" for keyword in node.keywords)
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _looked_up(_packet(function), key, out=out)
    if isinstance(function, types.BuiltinFunctionType) and not _is_torchs(function):
        return Operator(f"{function.__module__}.{function.__name__}", custom=True, autocast_rule=False, out=out)
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "_VF":
        return _looked_up(f"aten::{name}", key, out=out)
    receiver = isinstance(node.func, ast.Attribute) and (
        any(value.role == "self" for value in operation.values)
        or (function is MISSING and isinstance(node.func.value, ast.Call) and hasattr(torch.Tensor, name))
    )
    if receiver or isinstance(function, types.BuiltinFunctionType):
        return _looked_up(f"aten::{name}", key, out=out)
    return Operator(out=out)


def _operator_name(operator: ast.operator) -> str:
    name = type(operator).__name__
    return {"MatMult": "matmul", "Mult": "mul"}.get(name, name.lower())


def _is_torchs(function: types.BuiltinFunctionType) -> bool:
    owner = getattr(function, "__module__", None) or getattr(type(function.__self__), "__module__", "")
    return owner is None or owner.partition(".")[0] in ("torch", "builtins", "_VF")


def _packet(op: Any) -> str:
    return str(op._qualified_op_name if isinstance(op, torch._ops.OpOverloadPacket) else op._name.partition(".")[0])


def _looked_up(qualified: str, key: str | None, *, out: bool = False) -> Operator:
    namespace, _, name = qualified.partition("::")
    return Operator(
        op=qualified,
        custom=namespace not in ("aten", "prims", "prim"),
        autocast_rule=_has_rule(namespace, name, key),
        in_place=name.endswith("_") and not name.endswith("__"),
        out=out,
    )


def _has_rule(namespace: str, name: str, key: str | None) -> bool | None:
    packet = getattr(getattr(torch.ops, namespace), name, None) if name and key else None
    if packet is None or key is None:
        return None
    overloads = [packet._qualified_op_name + ("" if one == "default" else f".{one}") for one in packet.overloads()]
    try:
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(overload, key) for overload in overloads)
    except RuntimeError:
        return None
