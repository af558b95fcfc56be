"""The fit-start walk: what a model, its optimizers and its scaler consist of. No forward pass, no device access."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ampcheck.precision import LOW_PRECISION, Precision
from ampcheck.source.printable import shown
from ampcheck.trace import Environment, ModelInfo, ModuleInfo, OptimizerInfo, Policy, ScalerInfo, TensorInfo

_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
_WRAPPING = frozenset({"_orig_mod", "_fsdp_wrapped_module"})


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name for a dtype, without the ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside data-parallel and compile wrappers."""
    wrapped: object = model
    while isinstance(wrapped, nn.Module):
        model = wrapped
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        wrapped = model.module if parallel else getattr(model, "_orig_mod", None)
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether any module of the model, or a method set on the model itself, runs through ``torch.compile``."""
    return any(map(_is_compiled_function, vars(model).values())) or any(map(_runs_compiled, model.modules()))


def anything_compiled() -> bool:
    """Whether this process has used ``torch.compile`` at all."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and any(getattr(dynamo, "cached_backends", {}).values())


def _runs_compiled(module: nn.Module) -> bool:
    return (
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or _is_compiled_function(module.__dict__.get("forward"))
        or _is_compiled_function(inspect.getattr_static(type(module), "forward", None))
    )


def _is_compiled_function(value: object) -> bool:
    return getattr(value, "_torchdynamo_orig_callable", None) is not None


def module_names(model: nn.Module) -> dict[int, str]:
    """Qualified names by identity, without the parts that wrappers inside the model add."""
    return {id(module): plain_name(name) for name, module in model.named_modules()}


def hooked_modules(model: nn.Module) -> tuple[str, ...]:
    """The modules that have full backward hooks."""
    hooked = [module for module in model.modules() if _has_backward_hooks(module)]
    names = module_names(model) if hooked else {}
    return tuple(names[id(module)] for module in hooked)


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks and module._is_full_backward_hook) or bool(module._backward_pre_hooks)


def plain_name(name: str) -> str:
    """A qualified name without the attributes in which wrappers (compiled, sharded) hold what they wrap."""
    if name.isprintable() and not any(part in name for part in _WRAPPING):
        return name
    return shown(".".join(part for part in name.split(".") if part not in _WRAPPING))


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Qualified names of parameters and buffers by identity."""
    names = {id(tensor): shown(name) for name, tensor in model.named_buffers()}
    names.update((id(tensor), shown(name)) for name, tensor in model.named_parameters())
    return names


def walk(model: nn.Module) -> ModelInfo:
    """Walk the modules of ``model`` once, with the parameters and buffers that each owns."""
    modules: list[ModuleInfo] = []
    tensors: list[TensorInfo] = []
    seen: set[int] = set()
    elements: dict[str, int] = {}
    for name, module in model.named_modules():
        name = plain_name(name)
        prefix = f"{name}." if name else ""
        parameters: dict[str, int] = {}
        buffers: dict[str, int] = {}
        for owned, counts in ((module._parameters, parameters), (module._buffers, buffers)):
            for key, tensor in owned.items():
                if tensor is None:
                    continue
                dtype = dtype_name(tensor.dtype)
                counts[dtype] = counts.get(dtype, 0) + 1
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                lazy = type(tensor) in _LAZY
                device_type = tensor.device.type
                shape = () if lazy else tuple(tensor.shape)
                buffer = counts is buffers
                # Buffers decide the device only if there are no parameters.
                elements[device_type] = elements.get(device_type, 0) + (1 if buffer or lazy else 1000 * tensor.numel())
                made = tensor.requires_grad, buffer, not lazy and tensor.is_inference()
                tensors.append(TensorInfo(prefix + key, dtype, shape, device_type, *made))
        modules.append(ModuleInfo(name, type(module).__name__, parameters, buffers))
    device_type = max(elements, key=elements.__getitem__) if elements else "cpu"
    policies = tuple(_policies(model))
    return ModelInfo(type(model).__name__, device_type, tuple(modules), tuple(tensors), is_compiled(model), policies)


def _policies(model: nn.Module) -> Iterator[Policy]:
    """Yield the policies of the modules that ``fully_shard`` has sharded or ``FullyShardedDataParallel`` wraps."""
    kinds = _sharded_types()
    for name, module in model.named_modules() if kinds else ():
        if not isinstance(module, kinds):
            continue
        # The wrapper shows its policy; `fully_shard` keeps the one it was given only in its state.
        state = getattr(module, "_get_fsdp_state", None)
        shown = vars(state()).values() if state is not None else [getattr(module, "mixed_precision", None)]
        given = next((value for value in shown if hasattr(value, "param_dtype")), None)
        dtype = getattr(given, "param_dtype", None)
        casts = getattr(given, "cast_forward_inputs", True) or (
            module is model and getattr(given, "cast_root_forward_inputs", False)
        )
        kind = "MixedPrecisionPolicy" if state is not None else "MixedPrecision"
        spelled = f"{kind}(param_dtype={dtype})"
        yield Policy(plain_name(name), dtype_name(dtype) if dtype is not None else None, bool(casts), spelled)


def is_sharded(model: nn.Module) -> bool:
    """Whether parts of the model live on other ranks and are gathered for each forward pass."""
    return bool(_sharded_types()) and any(map(is_sharded_itself, model.modules()))


def is_sharded_itself(module: nn.Module) -> bool:
    """Whether the module gathers its own parameters before its forward pass, and shards them again after it."""
    return isinstance(module, _sharded_types())


def _sharded_types() -> tuple[type, ...]:
    # Nothing is sharded before one of these is imported; until 2.5 only the second had `fully_shard`.
    packages = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    found = [
        getattr(sys.modules.get(package), name, None)
        for package in packages
        for name in ("FSDPModule", "FullyShardedDataParallel")
    ]
    return tuple({kind for kind in found if isinstance(kind, type)})


def precision_by_policy(model: ModelInfo, declared: Precision, scaler: bool) -> Precision:
    """``declared`` or, if policies of a sharded model ask for another low precision, that one."""
    asked = [policy for policy in model.policies if policy.dtype in LOW_PRECISION]
    if not asked or declared.dtype == asked[0].dtype:
        return declared
    return Precision("mixed", model.device_type, asked[0].dtype, scaler, asked[0].source, by="policy")


def examine_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerInfo:
    """Describe the optimizer, and how far its parameters are the model's."""
    own = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    # First of all: what follows refers to the parameters too.
    orphans = sum(id(parameter) not in own for parameter in _held_by_nobody_else(optimizer))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Inside `torch.func.functional_call` other tensors stand in for the parameters: their owner is unknown.
    swapped = not all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    return OptimizerInfo(
        type(optimizer).__name__,
        len(held),
        len(held) if swapped else sum(id(parameter) in own for parameter in held),
        dict(Counter(dtype_name(parameter.dtype) for parameter in held)),
        bool(getattr(optimizer, "_step_supports_amp_scaling", False)),
        _shapes(held) == _shapes(parameter for parameter in model.parameters() if parameter.requires_grad),
        frozenset(own[id(parameter)] for parameter in held if id(parameter) in own),
        tuple(tuple(p.shape) for p in held if id(p) not in own and not swapped and type(p) not in _LAZY),
        orphans,
        tuple(_lost_eps(optimizer)),
    )


def _lost_eps(optimizer: torch.optim.Optimizer) -> Iterator[tuple[float, str]]:
    """Each ``eps`` that the parameters' dtype rounds to 0, in PyTorch's own optimizers, whose state has that dtype."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    found = {
        (float(group["eps"]), parameter.dtype)
        for group in optimizer.param_groups
        # A fused optimizer adds it in float32.
        if isinstance(group.get("eps"), float) and group["eps"] and not group.get("fused")
        for parameter in group["params"]
        if dtype_name(parameter.dtype) in LOW_PRECISION
    }
    for eps, dtype in found:
        # Half the smallest number is rounded up to it.
        if eps < torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2:
            yield eps, dtype_name(dtype)


def _held_by_nobody_else(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters that only the optimizer still refers to: what they belonged to is gone."""
    # How many references a list and reading from it make differs from one Python to the next.
    alone = _references([torch.empty(0)])[0]
    return [
        parameter
        for group in optimizer.param_groups
        for parameter, references in zip(group["params"], _references(group["params"]), strict=True)
        if references - (parameter in optimizer.state) <= alone
    ]


def _references(tensors: list[torch.Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


def _shapes(parameters: Iterable[torch.Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(p.shape) for p in parameters if type(p) not in _LAZY)


def examine_scaler(scaler: torch.amp.GradScaler) -> ScalerInfo:
    kind = type(scaler)
    old = kind.__module__.startswith(("torch.cuda.amp", "torch.cpu.amp"))
    deprecated = f"{kind.__module__.removesuffix('.grad_scaler')}.{kind.__name__}" if old else None
    return ScalerInfo(kind.__name__, scaler.is_enabled(), str(getattr(scaler, "_device", "cuda")), deprecated)


@functools.cache
def environment() -> Environment:
    """The installed PyTorch and what its devices compute natively."""
    return Environment(torch.__version__, dict(_native_dtypes()), has_autocast_cache_fault())


def _native_dtypes() -> Iterable[tuple[tuple[str, str], bool]]:
    mkldnn = torch.ops.mkldnn
    for dtype, probe in (("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")):
        if torch.backends.mkldnn.is_available() and hasattr(mkldnn, probe):
            yield ("cpu", dtype), bool(getattr(mkldnn, probe)())
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield ("cuda", "float16"), torch.version.hip is not None or (major, minor) >= (5, 3)
        yield ("cuda", "bfloat16"), torch.version.hip is not None or major >= 8


@functools.cache
def has_autocast_cache_fault() -> bool:
    # In its own thread: modes, autocast and the node counter belong to the caller's thread.
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(_loses_cached_gradients()))
    thread.start()
    thread.join()
    return answers[0]


def _loses_cached_gradients() -> bool:
    x, weight = torch.ones(1, 1, device="cpu"), torch.ones(1, 1, device="cpu", requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            nn.functional.linear(x, weight)
        return not nn.functional.linear(x, weight).requires_grad
