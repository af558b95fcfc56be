"""Failures of a gradient scaler, read from its frames: its optimizer, and the state of the gradients."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ampcheck.failure.code import expressions_at, function_at, read, site_in, tree_of
from ampcheck.failure.frames import Frame, Scene, still_running, user_code_first
from ampcheck.observe.walk import tensor_names
from ampcheck.source.lines import is_library
from ampcheck.trace import (
    Disorder,
    LowPrecisionGradients,
    MissingGradients,
    ScalerArgument,
    ScalerOrder,
    Site,
    WithoutGradient,
)

_DISORDERS: dict[str, Disorder] = {
    "unscaled_twice": "unscaled-twice",
    "unscaled_late": "unscaled-late",
    "stepped_twice": "stepped-twice",
    "never_scaled": "never-scaled",
    "early_update": "early-update",
}


def _optimizer_of(found: Sequence[Frame]) -> torch.optim.Optimizer | None:
    """The optimizer that was passed to the innermost scaler frame."""
    for frame in reversed(found):
        if frame.in_torch("amp/grad_scaler.py"):
            optimizer = frame.names.get("optimizer")
            # Hosts pass their own wrappers, which keep the optimizer's groups.
            if hasattr(optimizer, "param_groups"):
                return optimizer
    return None


def low_precision_gradients(scene: Scene) -> LowPrecisionGradients:
    """Every parameter of the optimizer with a float16 gradient, and the line that cast them."""
    optimizer = _optimizer_of(scene.found)
    if optimizer is None:
        return LowPrecisionGradients()
    named = _named(optimizer, scene.root)
    low = [(name, p) for name, p in named if p.grad is not None and p.grad.dtype is torch.float16]
    return LowPrecisionGradients(
        optimizer=type(optimizer).__name__,
        optimized=len(named),
        parameters=tuple(name for name, _ in low),
        cast=_casting_site((*still_running(scene.exc), *scene.found), scene.root, [p for _, p in low]),
    )


def _casting_site(found: Sequence[Frame], root: nn.Module | None, parameters: Sequence[torch.Tensor]) -> Site | None:
    """The one call in the user's source that made a module with one of ``parameters`` float16: before the running line
    of a function, else in the ``__init__`` of one of the model's modules. A call under a condition counts if the
    condition holds, as far as that is known. ``None`` if there is no such call, or more than one."""
    low = {id(parameter) for parameter in parameters}
    users = [(function_at(frame), frame) for frame in found if not frame.library]
    running = [([cast for cast in _casts(at, frame) if cast.line < frame.line], frame) for at, frame in users]
    sites = _casting(running, low) or _casting(_methods(root), low)
    return sites.pop() if len(sites) == 1 else None


def _methods(root: nn.Module | None) -> Iterator[tuple[list[_Cast], Frame]]:
    """The casts in the ``__init__`` of each user class, with every module of that class."""
    of_kind: dict[type, list[_Cast]] = {}
    for module in root.modules() if root is not None else ():
        kind = type(module)
        source = sys.modules.get(kind.__module__)
        file = getattr(source, "__file__", None) or ""
        if kind not in of_kind:
            of_kind[kind] = _casts(_init_of(file, kind.__name__)) if file and not is_library(file) else []
        if of_kind[kind]:
            yield of_kind[kind], Frame(file, 0, "", {"self": module}, vars(source))


def _casting(scopes: Iterable[tuple[list[_Cast], Frame]], low: set[int]) -> set[Site]:
    sites: set[Site] = set()
    for casts, frame in scopes:
        for cast in casts:
            targets = (read(target, frame) for target in cast.targets)
            module = next((one for one in targets if isinstance(one, nn.Module)), None)
            if module is None or low.isdisjoint(map(id, module.parameters())):
                continue
            if cast.dtypes is None or any(read(dtype, frame) is torch.float16 for dtype in cast.dtypes):
                sites.add(site_in(frame.file, cast.line, "cast"))
    return sites


_PLAIN = (bool, int, float, str, type(None))


class _Cast(NamedTuple):
    """A call of ``half()`` or ``to(...)``: what it may be called on (the name, in ``net = Net().half()``), and what may
    be the dtype; ``None`` for ``half()``."""

    line: int
    targets: tuple[ast.expr, ...]
    dtypes: tuple[ast.expr, ...] | None


def _casts(scope: ast.AST | None, frame: Frame | None = None) -> list[_Cast]:
    found: list[_Cast] = []
    pending: list[ast.AST] = list(getattr(scope, "body", ()))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.With, ast.For)) or (isinstance(node, ast.If) and _holds(node.test, frame)):
            pending += node.body
        if not isinstance(node, (ast.Assign, ast.Expr)):
            continue
        call, named = node.value, node.targets if isinstance(node, ast.Assign) else ()
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("half", "to"):
            given = (*call.args, *(keyword.value for keyword in call.keywords))
            dtypes = None if call.func.attr == "half" else given
            found.append(_Cast(node.lineno, (call.func.value, *named), dtypes))
    return found


def _holds(test: ast.expr, frame: Frame | None) -> bool:
    """Whether a condition on plain values held when the frame was left."""
    if frame is None:
        return False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = read(test.operand, frame)
        return type(value) in _PLAIN and not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], (ast.Eq, ast.NotEq)):
        one, other = read(test.left, frame), read(test.comparators[0], frame)
        known = type(one) in _PLAIN and type(other) in _PLAIN
        return known and (one == other) is isinstance(test.ops[0], ast.Eq)
    value = read(test, frame)
    return type(value) in _PLAIN and bool(value)


def _init_of(file: str, name: str) -> ast.AST | None:
    tree = tree_of(file)
    classes = (node for node in (ast.walk(tree) if tree is not None else ()) if isinstance(node, ast.ClassDef))
    body = next((node.body for node in classes if node.name == name), [])
    return next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)


def missing_gradients(scene: Scene) -> MissingGradients:
    """The optimizer's parameters by the reason why they have no gradient, and how many others have one."""
    optimizer, root = _optimizer_of(scene.found), scene.root
    if optimizer is None:
        return MissingGradients()
    named = _named(optimizer, root)
    held = {id(p) for _, p in named}
    own = {id(p) for p in root.parameters()} if root is not None else set()
    elsewhere = _of_other_networks(scene)
    groups: dict[WithoutGradient, list[str]] = {"frozen": [], "not-the-models": [], "no-gradient": []}
    for name, parameter in named:
        if parameter.grad is not None:
            continue
        if not parameter.requires_grad:
            groups["frozen"].append(name)
        elif id(parameter) in elsewhere:
            groups["no-gradient"].append(elsewhere[id(parameter)])
        elif own and id(parameter) not in own:
            groups["not-the-models"].append(name)
        else:
            groups["no-gradient"].append(name)
    others = [p for p in (root.parameters() if root is not None else ()) if p.grad is not None and id(p) not in held]
    return MissingGradients(
        optimizer=type(optimizer).__name__,
        optimized=len(named),
        without_gradient={why: tuple(names) for why, names in groups.items() if names},
        gradients_elsewhere=len(others),
    )


def _of_other_networks(scene: Scene) -> dict[int, str]:
    """Names of the parameters of networks that the user's variables hold beside the model (a critic), by identity. One
    with the model's shapes may be a copy that trains by mistake, and is left out."""
    root = scene.root
    if root is None:
        return {}
    names: dict[int, str] = {}
    own = {id(part) for part in root.modules()}
    shapes = sorted(tuple(parameter.shape) for parameter in root.parameters())
    for frame in scene.found:
        held = dict(frame.names) if not frame.library else {}
        if not isinstance(held.get("self"), nn.Module):
            held |= {f"self.{name}": value for name, value in getattr(held.get("self"), "__dict__", {}).items()}
        for name, value in held.items():
            if not isinstance(value, nn.Module) or id(value) in own or any(part is root for part in value.modules()):
                continue
            if sorted(tuple(parameter.shape) for parameter in value.parameters()) != shapes:
                names |= {id(parameter): f"{name}.{path}" for path, parameter in value.named_parameters()}
    return names


def scaler_argument(scene: Scene) -> ScalerArgument:
    """The argument that a scaler does not take, or its ``init_scale`` that should be a device."""
    unexpected = scene.said.get("unexpected")
    if unexpected is not None:
        if unexpected == "Closure":
            return ScalerArgument("closure")
        call = _call_with(scene, unexpected)
        if call is None:
            return ScalerArgument(unexpected)
        return ScalerArgument(unexpected, call=ast.unparse(call), corrected=_corrected(call, unexpected))
    for frame in reversed(scene.found):
        scaler = frame.receiver
        if frame.in_torch("amp/grad_scaler.py") and isinstance(scaler, torch.amp.GradScaler):
            kind = type(scaler)
            old = kind is not torch.amp.GradScaler and kind.__module__.startswith(("torch.cuda", "torch.cpu"))
            name = f"torch.{kind.__module__.split('.')[1]}.amp.GradScaler" if old else "torch.amp.GradScaler"
            return ScalerArgument("init_scale", repr(scaler._init_scale), name)
    return ScalerArgument("init_scale")


_PARAMETERS = ("device", "init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")


def _call_with(scene: Scene, keyword: str) -> ast.Call | None:
    """The one call of a scaler in the running line of user code that passes ``keyword``."""
    for frame in user_code_first(scene.found):
        calls = [node for node in expressions_at(frame) if isinstance(node, ast.Call)]
        calls = [call for call in calls if any(one.arg == keyword for one in call.keywords)]
        if len(calls) == 1 and ast.unparse(calls[0].func).endswith("GradScaler"):
            return calls[0]
    return None


def _corrected(call: ast.Call, keyword: str) -> str:
    """The call of ``torch.amp.GradScaler`` that was meant."""
    meant = "device" if keyword in ("device", "device_type") else None
    close = [meant] if meant else difflib.get_close_matches(keyword, _PARAMETERS, 1)
    kept = [one for one in call.keywords if one.arg != keyword]
    renamed = [ast.keyword(close[0], one.value) for one in call.keywords if one.arg == keyword and close]
    # Its older spellings take no device, and the initial scale first.
    old = ast.unparse(call.func) in ("torch.cuda.amp.GradScaler", "torch.cpu.amp.GradScaler") or keyword == "device"
    positional = [ast.keyword(name, value) for name, value in zip(_PARAMETERS[1:], call.args, strict=False)]
    function = ast.parse("torch.amp.GradScaler", mode="eval").body if old else call.func
    return ast.unparse(ast.Call(function, [] if old else call.args, [*renamed, *(positional if old else ()), *kept]))


def scaler_order(scene: Scene) -> ScalerOrder:
    """Which calls came in the wrong order, and the optimizer that they were for."""
    optimizer = _optimizer_of(scene.found)
    reason = next(_DISORDERS[group] for group, text in scene.said.items() if text)
    return ScalerOrder(reason, type(optimizer).__name__ if optimizer is not None else None)


def _named(optimizer: Any, root: nn.Module | None) -> list[tuple[str, torch.Tensor]]:
    names = tensor_names(root) if root is not None else {}
    return [
        (names.get(id(parameter), f"param_groups[{g}]['params'][{i}]"), parameter)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    ]
