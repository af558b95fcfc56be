"""Hand-built failures, for the traces of ``traces.py``."""

from __future__ import annotations

from typing import Any

from rules.traces import trace

from ampcheck.trace import (
    AutocastCall,
    BackwardHookView,
    CustomFunction,
    CustomFunctionState,
    CustomFunctionViewModified,
    DtypeMismatch,
    Facts,
    FailedOperand,
    FailedOperation,
    Failure,
    FirstStepSkipped,
    FusedOptimizerClipping,
    GraphFreed,
    GraphTrace,
    InferenceTensor,
    InPlaceDtype,
    InternalOverlap,
    LeafModified,
    LeafViewModified,
    LowPrecisionGradients,
    MissingGradients,
    MultiViewModified,
    NoGradViewModified,
    NoGraph,
    NoNumpyDtype,
    OpNotImplemented,
    Producer,
    SavedTensorModified,
    ScalerArgument,
    ScalerOrder,
    ScalerWithoutBfloat16,
    Site,
    StaleTensor,
    Trace,
    UnsafeLoss,
    ValueRejected,
    ViewedBaseModified,
    Write,
)

RAISED = Site("/work/net.py", 30, "Net.forward", "return F.linear(x, self.weight)", "raise")


def line(number: int, code: str = "", role: Any = "call", **more: Any) -> Site:
    return Site("/work/net.py", number, "Net.forward", code, role, **more)


def failed(
    facts: Facts | None,
    *,
    phase: str = "forward",
    module: str | None = "head",
    module_type: str | None = "Linear",
    raised: Site = RAISED,
    **known: Any,
) -> Trace:
    """A healthy run that ended in a failure of ``facts``; ``known`` is what else was seen of it."""
    chain = (("RuntimeError", "words"),)
    failure = Failure("RuntimeError", "words", phase, 3, facts, chain, (raised,), module, module_type)
    return trace(failure=failure, **known)


def operand(name: str, dtype: str, *shape: int, device: str = "cuda:0", **more: Any) -> FailedOperand:
    return FailedOperand(name, dtype, shape, device, **more)


X = operand("x", "float16", 2, 4, producer=Producer("stem", "self.stem(x)", line(20, "x = self.stem(x)", "cast")))
WEIGHT = operand("head.weight", "float32", 4, 4, stored="parameter")


def operation(*operands: FailedOperand, **more: Any) -> FailedOperation:
    """``F.linear`` of float16 and float32, or of ``operands``."""
    operands = operands or (X, WEIGHT)
    made = tuple(one.producer.site for one in operands if one.producer is not None)
    dtypes = tuple(dict.fromkeys(one.dtype for one in operands))
    known = {"op": "aten::linear", "expression": "F.linear(x, self.weight)", "autocast_rule": True} | more
    return FailedOperation(dtypes, operands, made, **known)


FUNCTION = CustomFunction("Scatter", "forward", line(5, "def forward(ctx, x):"), device_types=("cuda",))

ONE_OF_EACH: tuple[Facts, ...] = (
    AutocastCall("device-keyword", "device", "torch.autocast(device_type='cuda')"),
    DtypeMismatch(operation()),
    InPlaceDtype(operation()),
    OpNotImplemented(operation(X)),
    NoNumpyDtype(operation(X)),
    CustomFunctionState(FUNCTION),
    UnsafeLoss(),
    LowPrecisionGradients("SGD", 3, ("head.weight",)),
    MissingGradients("SGD", 3, {"no-gradient": ("head.weight",)}),
    ScalerOrder("unscaled-twice", "SGD"),
    ScalerArgument("init_scale"),
    ScalerWithoutBfloat16(),
    FusedOptimizerClipping(),
    FirstStepSkipped(),
    SavedTensorModified(),
    LeafModified(),
    LeafViewModified(),
    MultiViewModified("Split", 0),
    CustomFunctionViewModified("Same", 0),
    NoGradViewModified(mode="no_grad"),
    ViewedBaseModified("Split", 0),
    BackwardHookView(),
    InferenceTensor("saved"),
    GraphFreed(),
    NoGraph(),
    InternalOverlap(),
    ValueRejected(),
)


def stale(*writes: Write, **more: Any) -> StaleTensor:
    """The output of a relu, saved at line 40 and overwritten by ``writes``."""
    save = line(40, "x = F.relu(x)", "save", module="stem")
    known = {"node": "ReluBackward0", "slot": "result", "op": "aten::relu", "save": save, "version_saved": 0}
    return StaleTensor(dtype="float32", shape=(2, 4), **(known | {"writes": writes} | more))


def write(number: int = 41, code: str = "x.mul_(2)", op: str = "aten::mul_", **more: Any) -> Write:
    return Write(op, line(number, code, "write", module="head"), **more)


def died_in_backward(*tensors: StaleTensor, **more: Any) -> Trace:
    """PyTorch found ``tensors`` stale, the first of them first."""
    facts = SavedTensorModified("Relu", 0, "float32", (2, 4), 1, 0)
    known = {"graph": GraphTrace(tensors)} if tensors else {}
    return failed(facts, phase="backward", module=None, module_type=None, **(known | more))
