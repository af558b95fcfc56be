"""One real crash a wording: what is run, the kind of facts it must have, and some of these facts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ampcheck.trace import (
    AutocastCall,
    BackwardHookView,
    CustomFunctionViewModified,
    DtypeMismatch,
    FirstStepSkipped,
    GraphFreed,
    InferenceTensor,
    InPlaceDtype,
    InternalOverlap,
    LeafModified,
    LeafViewModified,
    MultiViewModified,
    NoGradViewModified,
    NoGraph,
    NoNumpyDtype,
    OpNotImplemented,
    SavedTensorModified,
    ScalerArgument,
    ValueRejected,
    ViewedBaseModified,
)

Crash = Callable[[], Any]
H, B = torch.float16, torch.bfloat16
R = torch.randn
CRASHES: list[tuple[str, type | None, dict[str, Any], Crash]] = []


def crash(kind: type | None, **facts: Any) -> Callable[[Crash], Crash]:
    def add(run: Crash) -> Crash:
        CRASHES.append((run.__name__, kind, facts, run))
        return run

    return add


def dtype_crash(name: str, run: Callable[[torch.dtype], Any], kind: type = DtypeMismatch, **facts: Any) -> None:
    for dtype in (H, B):
        CRASHES.append((f"{name}-{dtype}", kind, facts, lambda dtype=dtype: run(dtype)))


I = torch.tensor([0, 1])  # noqa: E741 (an index)
dtype_crash("linear", lambda d: F.linear(R(2, 4).to(d), R(3, 4), R(3)))
dtype_crash("linear-without-bias", lambda d: F.linear(R(2, 4).to(d), R(3, 4)))
dtype_crash("linear-float-bias", lambda d: F.linear(R(2, 4).to(d), R(3, 4).to(d), R(3)))
dtype_crash("matmul", lambda d: R(2, 4).to(d) @ R(4, 3))
dtype_crash("dot", lambda d: torch.dot(R(3).to(d), R(3)))
dtype_crash("mv", lambda d: R(2, 4).to(d) @ R(4))
dtype_crash("bmm", lambda d: torch.bmm(R(1, 2, 4).to(d), R(1, 4, 3)))
dtype_crash("addmm", lambda d: torch.addmm(R(3), R(2, 4).to(d), R(4, 3).to(d)))
dtype_crash("baddbmm", lambda d: torch.baddbmm(R(1, 2, 3), R(1, 2, 4).to(d), R(1, 4, 3).to(d)))
dtype_crash("einsum", lambda d: torch.einsum("ij,jk->ik", R(2, 4).to(d), R(4, 3)))
dtype_crash("tensordot", lambda d: torch.tensordot(R(3, 3).to(d), R(3, 3), 1))
dtype_crash("multi-dot", lambda d: torch.linalg.multi_dot([R(3, 3).to(d), R(3, 3)]))
dtype_crash("bilinear", lambda d: F.bilinear(R(2, 4).to(d), R(2, 4).to(d), R(3, 4, 4)))
dtype_crash("convolution", lambda d: F.conv2d(R(1, 1, 4, 4).to(d), R(1, 1, 3, 3), R(1)))
dtype_crash("convolution-float-bias", lambda d: F.conv2d(R(1, 1, 4, 4).to(d), R(1, 1, 3, 3).to(d), R(1)))
dtype_crash("convolution-without-bias", lambda d: F.conv2d(R(1, 1, 4, 4).to(d), R(1, 1, 3, 3)))
dtype_crash("convolution-half-weight", lambda d: F.conv2d(R(1, 1, 4, 4), R(1, 1, 3, 3).to(d)))
dtype_crash("transposed-convolution", lambda d: F.conv_transpose2d(R(1, 1, 4, 4).to(d), R(1, 1, 3, 3)))
dtype_crash("attention", lambda d: F.scaled_dot_product_attention(R(1, 1, 4, 4).to(d), R(1, 1, 4, 4), R(1, 1, 4, 4)))
dtype_crash("multi-head-attention", lambda d: nn.MultiheadAttention(4, 1)(*[R(2, 1, 4).to(d)] * 3))
dtype_crash("lstm", lambda d: nn.LSTM(4, 4)(R(2, 1, 4).to(d)))
dtype_crash("gru-state", lambda d: nn.GRU(4, 4)(R(2, 1, 4), R(1, 1, 4).to(d)))
dtype_crash("prelu", lambda d: nn.PReLU()(R(2, 4).to(d)))
dtype_crash("layer-norm", lambda d: nn.LayerNorm(4).to(d)(R(2, 4)))
dtype_crash("batch-norm", lambda d: nn.BatchNorm1d(4).to(d)(R(2, 4)))
dtype_crash("cross", lambda d: torch.cross(R(3).to(d), R(3), dim=0))
dtype_crash("grid-sample", lambda d: F.grid_sample(R(1, 1, 4, 4), R(1, 4, 4, 2).to(d), align_corners=False))
dtype_crash("class-weights", lambda d: F.cross_entropy(R(2, 4).to(d), torch.tensor([0, 1]), weight=torch.ones(4)))
dtype_crash("lerp", lambda d: torch.lerp(R(2), R(2).to(d), 0.5))
dtype_crash("quantile", lambda d: torch.quantile(R(4), torch.tensor(0.5, dtype=d)))
dtype_crash("gradient", lambda d: setattr(nn.Parameter(R(2)), "grad", R(2).to(d)))
dtype_crash("bce", lambda d: F.binary_cross_entropy(torch.rand(2).to(d).requires_grad_(), torch.rand(2)).backward())
dtype_crash("embedding-bag", lambda d: F.embedding_bag(I[None], R(4, 4).to(d), per_sample_weights=R(1, 2), mode="sum"))

dtype_crash("index-put", lambda d: torch.zeros(4).__setitem__(I, R(2).to(d)), InPlaceDtype)
dtype_crash("index-put-half", lambda d: torch.zeros(4, dtype=d).__setitem__(I, R(2)), InPlaceDtype)
dtype_crash("scatter", lambda d: torch.zeros(4).scatter_(0, I, R(2).to(d)), InPlaceDtype)
dtype_crash("scatter-add", lambda d: torch.zeros(4).scatter_add_(0, I, R(2).to(d)), InPlaceDtype)
dtype_crash("scatter-reduce", lambda d: torch.zeros(4).scatter_reduce_(0, I, R(2).to(d), "sum"), InPlaceDtype)
dtype_crash("index-add", lambda d: torch.zeros(4).index_add_(0, I, R(2).to(d)), InPlaceDtype)
dtype_crash("index-copy", lambda d: torch.zeros(4).index_copy_(0, I, R(2).to(d)), InPlaceDtype)
dtype_crash("put", lambda d: torch.zeros(4).put_(I, R(2).to(d)), InPlaceDtype)
dtype_crash("masked-scatter", lambda d: torch.zeros(4).masked_scatter_(torch.ones(4) > 0, R(4).to(d)), InPlaceDtype)
dtype_crash("integer-target", lambda d: torch.ones(4, dtype=torch.int64).add_(R(4).to(d)), InPlaceDtype)
dtype_crash("out", lambda d: torch.mm(R(4, 4), R(4, 4), out=torch.zeros(4, 4, dtype=d)), InPlaceDtype)

dtype_crash("cdist", lambda d: torch.cdist(R(2, 4).to(d), R(2, 4).to(d), p=1), OpNotImplemented)
dtype_crash("inverse", lambda d: torch.linalg.inv(R(2, 2).to(d)), OpNotImplemented)
dtype_crash("svd", lambda d: torch.linalg.svd(R(2, 2).to(d)), OpNotImplemented)
dtype_crash("fft", lambda d: torch.fft.fft(R(4).to(d)), OpNotImplemented)
dtype_crash("stft", lambda d: torch.stft(R(400).to(d), 64, return_complex=True), OpNotImplemented)
dtype_crash("quantile-of-half", lambda d: torch.quantile(R(4).to(d), 0.5), OpNotImplemented)
dtype_crash("least-squares", lambda d: torch.linalg.lstsq(R(2, 2).to(d), R(2, 2).to(d)), OpNotImplemented)
dtype_crash("ctc", lambda d: F.ctc_loss(R(5, 1, 4).to(d), I[None] + 1, I[:1] + 5, I[:1] + 2), OpNotImplemented)


@crash(InPlaceDtype, op="aten::lerp_", in_place=True)
def lerp_in_place() -> None:
    average, weight = torch.zeros(4).half(), R(4)
    average.lerp_(weight, 0.5)


@crash(InPlaceDtype, op="aten::_foreach_lerp_")
def foreach_lerp() -> None:
    averages, weights = [torch.zeros(4).half()], [R(4)]
    torch._foreach_lerp_(averages, weights, 0.5)


@crash(DtypeMismatch, op="aten::addmm_", in_place=True)
def addmm_in_place() -> None:
    total, a, b = torch.zeros(2, 2).half(), R(2, 2), R(2, 2)
    total.addmm_(a, b)


@crash(InPlaceDtype, out=True, op="aten::mm")
def product_into_half() -> None:
    a, b, result = R(2, 2), R(2, 2), torch.zeros(2, 2).half()
    torch.mm(a, b, out=result)


@crash(OpNotImplemented)
def polar() -> None:
    torch.polar(R(4).bfloat16(), R(4).bfloat16())


@crash(OpNotImplemented)
def view_as_complex() -> None:
    torch.view_as_complex(R(4, 2).bfloat16())


@crash(NoNumpyDtype)
def numpy() -> None:
    R(2).bfloat16().numpy()


@crash(SavedTensorModified, dtype="float32", shape=(4,), output=0, node="Relu", version_found=1, version_expected=0)
def saved_output_modified() -> None:
    y = nn.Parameter(R(4)).mul(2).relu()
    y += 1
    y.sum().backward()


@crash(SavedTensorModified, dtype="bfloat16", shape=(2, 3), node="Sigmoid")
def saved_bfloat16_modified() -> None:
    y = R(2, 3, requires_grad=True).bfloat16().sigmoid()
    y.mul_(2)
    y.sum().backward()


@crash(SavedTensorModified, node="AsStrided", version_found=2, version_expected=1)
def stepped_before_backward() -> None:
    layer = nn.Linear(4, 4)
    loss = layer(layer(R(2, 4))).sum()
    loss.backward(retain_graph=True)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    loss.backward()


@crash(LeafModified)
def leaf() -> None:
    weight = nn.Parameter(R(4))
    weight += 1


@crash(LeafViewModified)
def leaf_view() -> None:
    nn.Parameter(R(4))[0] = 1


@crash(MultiViewModified, node="Split", output=1)
def split() -> None:
    nn.Parameter(R(4)).mul(2).split(2)[1].add_(1)


@crash(MultiViewModified, node="Unbind", output=0)
def unbind() -> None:
    nn.Parameter(R(4)).mul(2).unbind()[0].add_(1)


@crash(MultiViewModified, node="Split")
def chunk() -> None:
    nn.Parameter(R(4)).mul(2).chunk(2)[0].add_(1)


@crash(NoGradViewModified, mode="no_grad")
def view_without_grad() -> None:
    y = nn.Parameter(R(4)).mul(2)
    with torch.no_grad():
        view = y[:2]
    view.add_(1)


@crash(ViewedBaseModified, node="Split", output=1)
def base_of_a_split() -> None:
    y = nn.Parameter(R(4)).mul(2)
    _, second = y.split(2)
    y.mul_(2)
    second.exp()


@crash(ViewedBaseModified, mode="no_grad")
def base_of_a_view_without_grad() -> None:
    y = nn.Parameter(R(4)).mul(2)
    with torch.no_grad():
        first, _ = y.unbind()[:2]
    y.mul_(2)
    first.exp()


@crash(BackwardHookView, node="BackwardHookFunction", output=0)
def backward_hook() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    model[0].register_full_backward_hook(lambda *args: None)
    model(R(2, 4)).sum().backward()


@crash(CustomFunctionViewModified, node="Same")
def custom_function_view() -> None:
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient

    Same.apply(R(4, requires_grad=True) * 1).add_(1)


@crash(InferenceTensor, use="saved")
def inference_tensor_saved() -> None:
    with torch.inference_mode():
        x = R(2, 4)
    nn.Linear(4, 4)(x)


@crash(InferenceTensor, use="written")
def inference_tensor_written() -> None:
    with torch.inference_mode():
        x = R(2, 4)
    x.add_(1)


@crash(GraphFreed)
def backward_twice() -> None:
    loss = nn.Parameter(R(4)).square().sum()
    loss.backward()
    loss.backward()


@crash(NoGraph, element=0)
def no_graph() -> None:
    torch.tensor(0.0).backward()


@crash(InternalOverlap)
def overlap() -> None:
    R(1).expand(4).add_(1)


@crash(InternalOverlap)
def overlapping_copy() -> None:
    x = R(4)
    x[1:].copy_(x[:-1])


@crash(ScalerArgument, argument="device_type")
def scaler_device_type() -> None:
    torch.amp.GradScaler(device_type="cpu")


@crash(ScalerArgument, argument="closure")
def closure_for_a_scaler() -> None:
    optimizer, scaler = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), torch.amp.GradScaler("cpu")
    scaler.step(optimizer, closure=lambda: None)


@crash(FirstStepSkipped)
def scheduler_warning_raised() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


@crash(AutocastCall, reason="dtype-not-a-dtype", argument="dtype", type="str", value="'float16'", replaces="call")
def autocast_dtype_string() -> None:
    with torch.autocast("cpu", dtype="float16"):  # type: ignore[arg-type]
        pass


@crash(DtypeMismatch)
def compiled_mismatch() -> None:
    def mismatch(x: torch.Tensor) -> torch.Tensor:
        return x.half() @ x

    torch._dynamo.reset()
    torch.compile(mismatch, backend="eager")(R(2, 2))


# Look-alikes: no fault of precision, whatever their words.


@crash(None)
def integer_target_of_a_loss() -> None:
    F.nll_loss(R(2, 4), R(2))


@crash(None)
def integer_matrix_product() -> None:
    torch.ones(2, 2, dtype=torch.int64) @ R(2, 2)


@crash(None)
def no_kernel_for_integers() -> None:
    torch.linalg.svd(torch.ones(2, 2, dtype=torch.int64))


@crash(None)
def wrong_shapes() -> None:
    R(2, 3) @ R(2, 3)


@crash(None)
def unknown_device_elsewhere() -> None:
    R(2).to("gpu")


@crash(ValueRejected)
def matcher_after_divergence() -> None:
    from scipy.optimize import linear_sum_assignment

    linear_sum_assignment([[float("nan"), 1.0], [1.0, 2.0]])


@crash(None)
def users_own_autocast() -> None:
    def autocast_batch(batch: Any) -> None:
        raise ValueError(f"cannot autocast {batch}")

    autocast_batch(1)


@crash(None)
def interrupted_while_handling() -> None:
    try:
        R(2, 2).half() @ R(2, 2)
    except RuntimeError:
        raise KeyboardInterrupt from None


@crash(None)
def out_of_memory_while_handling() -> None:
    try:
        R(2, 2).half() @ R(2, 2)
    except RuntimeError as error:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory") from error


@crash(ValueRejected)
def a_distribution_of_nan() -> None:
    torch.distributions.Categorical(logits=torch.full((2, 3), float("nan")), validate_args=True)


@crash(ValueRejected)
def an_assertion_of_the_programs() -> None:
    loss = torch.tensor(float("nan"))
    assert torch.isfinite(loss)
