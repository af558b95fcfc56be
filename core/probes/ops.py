"""The few function calls that rules ask about, seen above autocast."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn, overrides
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from ampcheck.precision import LOW_PRECISION
from ampcheck.probes.autocast import autocast_state
from ampcheck.probes.containment import bare, contained, hide_frame
from ampcheck.probes.modules import ModuleProbe
from ampcheck.probes.writes import WriteProbe
from ampcheck.source import calling_site
from ampcheck.trace import OpCall, Operand
from ampcheck.walk import dtype_name, tensor_names

# Functions that return the widest dtype of their tensors, by type promotion or by autocast's promote list.
_PROMOTING = {
    spelling: name
    for name in (
        *("add", "sub", "mul", "div", "true_divide", "rsub", "lerp", "addcmul", "addcdiv"),
        *("cat", "concat", "stack", "where", "maximum", "minimum"),
    )
    for spelling in (name, f"{name}_")
} | {
    f"__{prefix}{name}__": name.removeprefix("true")
    for name in ("add", "sub", "mul", "truediv")
    for prefix in ("", "r", "i")
}

# Below a dispatch mode these compute something else: autocast does not reach what their kernels call, or they take
# another algorithm. `tests/fuzz/every_op.py` finds them.
_APART = frozenset(
    {
        *("bilinear", "linear_cross_entropy", "norm", "nuclear_norm", "linalg_cond", "linalg_eigvalsh", "linalg_lstsq"),
        *("linalg_matrix_norm", "linalg_matrix_rank", "linalg_norm", "linalg_pinv", "linalg_polar", "linalg_svdvals"),
        *("linalg_vander", "max_pool1d"),
    }
)
# The same of their gradients, be it in the memory layout alone.
_APART_IN_BACKWARD = frozenset(
    {
        *("bilinear", "clamp", "clamp_max", "clamp_min", "clip", "cumprod", "fmax", "fmin", "linalg_lstsq"),
        *("linalg_householder_product", "linalg_vander", "masked_select", "max", "maximum", "median", "min", "minimum"),
        *("nanmedian", "ormqr", "prod"),
    }
)
_PYTORCHS_OWN = ("aten.", "prim.", "prims.", "c10d", "_c10d", "fsdp.", "symm_mem.")


class OpProbe(TorchFunctionMode):
    """Records, while it is active in the running thread:

    - calls of promoting functions that made float32 of a low-precision tensor because of a float32 parameter or
      buffer of the model,
    - calls of ``binary_cross_entropy`` and of ``Tensor.backward``, with autocast as they found it.

    It takes ``writes``, which is a dispatch mode, out of the way of the functions that such a mode changes: extension
    ops, whose kernels may be PyTorch programs themselves, and a few of PyTorch's own.

    It lies at the bottom of the stack of function modes, so that it can be entered and left at any two moments
    whatever ``with`` blocks of others begin and end in between. During an optimizer's step, of many calls and none of
    interest, it is off the stack.
    """

    def __init__(self, model: nn.Module, device_type: str, modules: ModuleProbe, writes: WriteProbe) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._names = tensor_names(model)
        self._device_type = device_type
        self._modules = modules
        self._writes = writes
        self._counts: dict[OpCall, int] = {}
        self._stepping: torch.optim.Optimizer | None = None
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self._given: tuple[Operand, ...] = ()
        self._engine: Any = None
        self._shadow: Any = None

    @property
    def calls(self) -> tuple[OpCall, ...]:
        return tuple(replace(call, count=count) for call, count in self._counts.items())

    def __enter__(self) -> OpProbe:
        self._thread = threading.get_ident()
        self._handles = [register_optimizer_step_pre_hook(self._before_step)]
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        self._put_at_the_bottom()
        self._engine = _AUTOGRAD._engine_run_backward
        _AUTOGRAD._engine_run_backward = self._shadow = self._run_backward
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        if self._shadow is not None and _AUTOGRAD._engine_run_backward is self._shadow:
            _AUTOGRAD._engine_run_backward = self._engine
        self._shadow = None
        _put_on(_taken_off(self))

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Backward leaves function modes behind, but what it recomputes must run as the forward pass did."""
        entered = False
        try:
            active = any(mode is self for mode in overrides._get_current_function_mode_stack())
            if self._shadow is not None and threading.get_ident() == self._thread and not active:
                self._put_at_the_bottom()
                entered = True
        except Exception as error:  # noqa: BLE001 - a fault of ours is not the training's
            self.error = self.error or bare(error)
        try:
            return self._engine(*args, **kwargs)
        except BaseException as error:
            hide_frame(error)
            raise
        finally:
            if entered:
                _put_on(_taken_off(self))

    def _put_at_the_bottom(self) -> None:
        others = _taken_off(None)
        # The mode of `torch.set_default_device`, where it goes through the stack to leave, insists on the last place.
        default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        insists = "_len_torch_function_stack" in DeviceContext.__exit__.__code__.co_names
        above = 1 if insists and others and others[0] is default else 0
        _put_on([*others[:above], self, *others[above:]])

    @contained
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure is a whole training step.
        closure = len(args) > 1 or kwargs.get("closure") is not None
        if threading.get_ident() == self._thread and self._stepping is None and not closure:
            self._stepping = optimizer
            _put_on(_taken_off(self))

    @contained
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping is optimizer:
            self._stepping = None
            self._put_at_the_bottom()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return self._run(func, args, kwargs or {})
        except BaseException as error:
            hide_frame(error)
            hide_frame(error)
            raise

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # What Dynamo traces must be the user's program alone.
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", None)
        if name in _APART or (isinstance(func, _OPS) and not str(func).startswith(_PYTORCHS_OWN)):
            output = self._writes.apart(func, args, kwargs)
        elif name in _PROMOTING and torch._C._current_graph_task_id() == -1:
            # An in-place op writes over its first operand: look first.
            self._given = ()
            self._look((*args, *kwargs.values()))
            operands = self._given
            output = func(*args, **kwargs)
            self._promoted(_PROMOTING[name], operands, output)
        else:
            if func is _BACKWARD or func is _BCE:
                self._called(func.__name__, args)
            output = func(*args, **kwargs)
        if name in _APART_IN_BACKWARD:
            self._differentiated_apart(output)
        return output

    @contained
    def _differentiated_apart(self, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                self._writes.apart_in_backward(tensor.grad_fn)

    @contained
    def _look(self, values: Iterable[Any]) -> None:
        self._given = self._operands(values)

    @contained
    def _called(self, op: str, args: tuple[Any, ...]) -> None:
        self._record(op, self._operands(args), ())

    @contained
    def _promoted(self, op: str, operands: tuple[Operand, ...], output: Any) -> None:
        if (
            isinstance(output, torch.Tensor)
            and output.dtype is torch.float32
            and any(o.dtype == "float32" and o.name and o.shape for o in operands)
            and any(o.dtype in LOW_PRECISION and o.shape for o in operands)
        ):
            self._record(op, operands, ("float32",))

    def _record(self, op: str, operands: tuple[Operand, ...], outputs: tuple[str, ...]) -> None:
        state = autocast_state(self._device_type)
        call = OpCall(op, self._modules.current, state, operands, outputs, calling_site())
        self._counts[call] = self._counts.get(call, 0) + 1

    def _operands(self, values: Iterable[Any]) -> tuple[Operand, ...]:
        return tuple(_operands(values, self._names))


_AUTOGRAD: Any = torch.autograd
_BACKWARD = torch.Tensor.backward
_BCE = nn.functional.binary_cross_entropy
_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _operands(values: Iterable[Any], names: dict[int, str]) -> Iterator[Operand]:
    for value in values:
        if isinstance(value, torch.Tensor):
            base = value._base
            name = names.get(id(value)) or (names.get(id(base)) if base is not None else None)
            yield Operand(dtype_name(value.dtype), tuple(value.shape), name)
        elif isinstance(value, (list, tuple)):
            yield from _operands(value, names)


def _taken_off(mode: TorchFunctionMode | None) -> list[TorchFunctionMode]:
    """Take ``mode`` (or, for ``None``, all) and what lies above it off the stack; return the others, lowest first."""
    taken: list[TorchFunctionMode] = []
    while torch._C._len_torch_function_stack():
        top = overrides._pop_mode()
        if top is mode:
            break
        taken.append(top)
    return taken[::-1]


def _put_on(modes: Iterable[TorchFunctionMode]) -> None:
    for mode in modes:
        overrides._push_mode(mode)
