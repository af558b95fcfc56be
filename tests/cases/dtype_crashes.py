"""Crashes over dtypes under mixed precision."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cases import Cases, Guard
from cases.training import BF16, images, rows, train

CASES = Cases(family="dtype")
case = CASES.case


@case(
    "hand-written-convolution",
    "AMP203",
    source=("https://github.com/open-mmlab/mmdetection/issues/11653",),
    module="conv",
    reason="autocast-disabled-here",
    remedies=2,
    marks={"raise": "raise", "call": "off", "cast": "made"},
    operands={"x": "bfloat16", "conv.weight": "bfloat16", "conv.bias": "float32"},
)
def hand_written_convolution(guard: Guard, repaired: int) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                with torch.autocast("cpu", enabled=False):
                    return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
            if repaired == 2:
                return F.conv2d(x, self.weight.to(x.dtype), self.bias)
            with torch.autocast("cpu", enabled=False):  # <- off
                return F.conv2d(x, self.weight.to(x.dtype), self.bias)  # <- raise

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 3)
            self.conv = Conv()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)  # <- made
            return self.conv(y)

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(images()))


@case(
    "disabled-out-of-sight",
    "AMP203",
    module="head",
    reason="autocast-disabled-here",
    remedies=2,
    operands={"features": "bfloat16", "head.weight": "float32", "head.bias": "float32"},
    marks={"raise": "raise", "call": "off"},
)
def disabled_out_of_sight(guard: Guard, repaired: int) -> None:
    @contextmanager
    def full_precision() -> Any:
        with torch.autocast("cpu", enabled=False):  # <- off
            yield

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.body(x)
            if repaired == 2:
                return self.head(features)
            with full_precision():
                return self.head(features.float() if repaired else features)  # <- raise

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case(
    "float64-input-under-autocast",
    "AMP203",
    module="head",
    reason="float64-operand",
    remedies=1,
    marks={"raise": "raise"},
    operands={"features": "float64", "head.weight": "float32", "head.bias": "float32"},
)
def float64_input_under_autocast(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(features.float() if repaired else features)  # <- raise

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows().double()))


@case(
    "weight-cast-for-another-region",
    "AMP203",
    module="head",
    reason="cached-cast",
    remedies=2,
    marks={"raise": "raise"},
    operands={"x": "float32", "head.weight": "float32", "head.bias": "float32"},
)
def weight_cast_for_another_region(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.head(x)
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return y + self.head(x)
            with torch.autocast("cpu", dtype=torch.float16, cache_enabled=not repaired):
                return y + self.head(x)  # <- raise

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case(
    "input-cast-by-hand",
    "AMP203",
    source=("https://github.com/YvanYin/Metric3D/issues/158",),
    module="conv",
    reason="autocast-never-entered",
    remedies=2,
    marks={"raise": "raise", "cast": "made"},
    operands={"x": "float16", "conv.weight": "float32", "conv.bias": "float32"},
)
def input_cast_by_hand(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = image.half()  # <- made
            if repaired == 1:
                with torch.autocast("cpu", dtype=torch.float16):
                    return self.conv(x)
            if repaired == 2:
                return self.conv(x.float())
            return self.conv(x)  # <- raise

    model = Net()
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "region-for-another-device",
    "AMP203",
    also=("AMP103",),
    module="fc",
    reason="autocast-never-entered",
    remedies=2,
    operands={"x": "bfloat16", "fc.weight": "float32", "fc.bias": "float32"},
)
def region_for_another_device(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.bfloat16()
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return self.fc(x)
            if repaired == 2:
                return self.fc(x.float())
            with torch.autocast("cuda", dtype=BF16):
                return self.fc(x)  # <- raise

    model = Net()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "half-parameters-float-positions",
    "AMP203",
    source=(
        "https://github.com/LeapLabTHU/ACmix/issues/21",
        "https://github.com/LeapLabTHU/ACmix/issues/18",
        "https://github.com/LeapLabTHU/ACmix/issues/15",
    ),
    module="conv_p",
    reason="parameter-not-float32",
    remedies=2,
    operands={"positions": "float32", "conv_p.weight": "float16", "conv_p.bias": "float16"},
    marks={"raise": "raise", "cast": "made"},
)
def half_parameters_float_positions(guard: Guard, repaired: int) -> None:
    class ACmix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_p = nn.Conv2d(2, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.linspace(-1, 1, 8).expand(8, 8)
            positions = torch.stack([rows, rows.T]).unsqueeze(0)  # <- made
            if repaired == 1:
                with torch.autocast("cpu", dtype=torch.float16):
                    return self.conv_p(positions)
            if repaired == 2:
                return self.conv_p(positions.to(torch.float16))
            return self.conv_p(positions)  # <- raise

    model = ACmix()
    if repaired != 1:
        model.half()
    with guard(model):
        train(model, lambda: model(images().half()))


@case(
    "half-model-float-indices",
    "AMP203",
    source=("https://github.com/intel/torch-xpu-ops/issues/2599",),
    module="pos_proj",
    reason="parameter-not-float32",
    remedies=2,
    operands={"indices": "float32", "pos_proj.weight": "bfloat16", "pos_proj.bias": "bfloat16"},
)
def half_model_float_indices(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_proj = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            indices = torch.zeros(1, 4, 3)
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return self.pos_proj(indices)
            if repaired == 2:
                indices = indices.to(torch.bfloat16)
            return self.pos_proj(indices)  # <- raise

    model = Attention() if repaired == 1 else Attention().bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


@case(
    "checkpoint-function",
    "AMP205",
    source=("https://github.com/Janspiry/Palette-Image-to-Image-Diffusion-Models/issues/40",),
    module="block",
    reason="custom-function",
    operands={"block.weight": "float32", "block.bias": "float32", "x": "bfloat16"},
)
def checkpoint_function(guard: Guard, repaired: int) -> None:
    decorate = [torch.amp.custom_fwd(device_type="cpu"), torch.amp.custom_bwd(device_type="cpu")]
    forwards, backwards = decorate if repaired else [lambda method: method] * 2

    class Checkpoint(torch.autograd.Function):
        @staticmethod
        @forwards
        def forward(ctx: Any, run: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            ctx.run, ctx.parameters = run, parameters
            ctx.save_for_backward(x)
            with torch.no_grad():
                return run(x)

        @staticmethod
        @backwards
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            x = ctx.saved_tensors[0].detach().requires_grad_(True)
            with torch.enable_grad():
                output = ctx.run(x)  # <- raise
            return None, *torch.autograd.grad(output, (x, *ctx.parameters), gradient)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.block = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Checkpoint.apply(self.block, self.stem(x), *self.block.parameters())

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "recompute-in-a-hook",
    "AMP203",
    source=(
        "https://github.com/lightonai/pylate/pull/242",
        "https://github.com/luyug/GradCache/issues/17",
    ),
    module="head",
    reason="autocast-never-entered",
    remedies=2,
    operands={"embedding": "bfloat16", "head.weight": "float32", "head.bias": "float32"},
)
def recompute_in_a_hook(guard: Guard, repaired: int) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model = Encoder()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            embedding = model.body(rows()).detach()
            output = model(rows())

        def second_pass(gradient: torch.Tensor) -> None:
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    model.head(embedding)
            else:
                model.head(embedding.float() if repaired else embedding)  # <- raise

        output.register_hook(second_pass)
        train(model, lambda: output)


@case(
    "bare-custom-fwd",
    "AMP205",
    source=("https://github.com/pytorch/pytorch/issues/47906",),
    module="align",
    reason="custom-function",
    operands={"features": "bfloat16", "rois": "float32"},
    evidence={"function": "RoIAlign"},
)
def bare_custom_fwd(guard: Guard, repaired: int) -> None:
    cast = {"cast_inputs": torch.float32} if repaired else {}

    class RoIAlign(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", **cast)
        def forward(ctx: Any, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(features, rois)
            return torch.cross(features, rois, dim=-1)  # <- raise

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            _, rois = ctx.saved_tensors
            return torch.cross(rois, gradient, dim=-1), None

    class Align(nn.Module):
        def forward(self, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
            return RoIAlign.apply(features, rois)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(4, 3)
            self.align = Align()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.align(self.backbone(x), torch.ones(4, 3))

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "custom-loss-function",
    "AMP205",
    source=("https://github.com/open-mmlab/OpenPCDet/pull/1247",),
    module="",
    reason="custom-function",
    operands={"predictions": "bfloat16", "targets": "float32"},
)
def custom_loss_function(guard: Guard, repaired: int) -> None:
    class SigmoidLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(targets)
            return torch.dot(predictions, targets)  # <- raise

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient * ctx.saved_tensors[0], None

    class RepairedLoss(SigmoidLoss):
        forward = staticmethod(  # type: ignore[assignment]
            torch.amp.custom_fwd(SigmoidLoss.forward, device_type="cpu", cast_inputs=torch.float32)
        )
        backward = staticmethod(  # type: ignore[assignment]
            torch.amp.custom_bwd(SigmoidLoss.backward, device_type="cpu")
        )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = RepairedLoss if repaired else SigmoidLoss
            return loss.apply(self.head(x).flatten(), targets)

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows(), torch.ones(4))
        train(model, lambda: output)


@case(
    "custom-function-state",
    "AMP205",
    source=("https://github.com/pytorch/pytorch/issues/132388",),
    module=None,
    reason="custom-function",
    marks={},
    evidence={"function": "Scale"},
)
def custom_function_state(guard: Guard, repaired: int) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    class OldStyle(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        backward = Scale.backward

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (OldStyle if repaired else Scale).apply(self.fc(x))

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "assignment-by-index",
    "AMP209",
    source=(
        "https://github.com/open-mmlab/mmdetection/issues/11416",
        "https://github.com/huggingface/transformers/issues/38963",
        "https://github.com/hiyouga/LlamaFactory/issues/3807",
        "https://github.com/hiyouga/LlamaFactory/issues/5943",
    ),
    module="",
    reason="in-place-or-out",
    remedies=2,
    operands={"targets": "float32", "predictions": "bfloat16"},
    marks={"raise": "raise", "cast": "made"},
)
def assignment_by_index(guard: Guard, repaired: int) -> None:
    class Assigner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            predictions = self.head(x)  # <- made
            matched = torch.tensor([0, 2, 3, 1])
            if repaired == 2:
                targets = torch.zeros(4, 4, dtype=predictions.dtype)
                targets[matched] = predictions
                return targets
            targets = torch.zeros(4, 4)
            if repaired == 1:
                targets[matched] = predictions.to(targets.dtype)
                return targets
            targets[matched] = predictions  # <- raise
            return targets

    model = Assigner()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "scatter-of-a-float-mask",
    "AMP209",
    source=("https://github.com/flairNLP/flair/pull/3651",),
    module="",
    reason="in-place-or-out",
    remedies=2,
    operands={"x": "bfloat16", "mask": "float32"},
)
def scatter_of_a_float_mask(guard: Guard, repaired: int) -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            mask = torch.ones(4, 4)
            index = torch.zeros(4, 4, dtype=torch.int64)
            if repaired == 1:
                return x.scatter_add(0, index, mask.to(x.dtype))
            if repaired == 2:
                x = x.to(mask.dtype)
            return x.scatter_add(0, index, mask)  # <- raise

    model = Pooling().bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


@case(
    "masked-scatter",
    "AMP209",
    source=("https://github.com/pytorch/rl/issues/1703",),
    module="",
    reason="in-place-or-out",
    remedies=2,
    operands={"buffer": "float32", "values": "bfloat16"},
)
def masked_scatter(guard: Guard, repaired: int) -> None:
    class Replay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = self.fc(x)
            buffer = torch.zeros(4, 4)
            mask = torch.ones(4, 4, dtype=torch.bool)
            if repaired == 1:
                return buffer.masked_scatter_(mask, values.to(buffer.dtype))
            if repaired == 2:
                buffer = torch.zeros(4, 4, dtype=values.dtype)
            return buffer.masked_scatter_(mask, values)  # <- raise

    model = Replay()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "half-average-of-a-float-model",
    "AMP209",
    module=None,
    reason="in-place-or-out",
    remedies=2,
    operands={"average": "float16", "fc.weight": "float32"},
)
def half_average_of_a_float_model(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    model = Net()
    average = model.fc.weight.detach().to(model.fc.weight.dtype if repaired == 2 else torch.float16, copy=True)
    with guard(model):
        train(model, lambda: model(rows()))
        with torch.no_grad():
            if repaired == 1:
                average.lerp_(model.fc.weight.to(average.dtype), 0.01)
            else:
                average.lerp_(model.fc.weight, 0.01)  # <- raise


@case(
    "matrix-product-in-place",
    "AMP203",
    module="",
    reason="in-place-or-out",
    operands={"total": "bfloat16", "a": "float32", "b": "float32"},
)
def matrix_product_in_place(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            total = self.fc(a)
            if repaired:
                return total.float().addmm_(a, b)
            return total.addmm_(a, b)  # <- raise

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows(), rows())
        train(model, lambda: output)


@case(
    "sampling-outside-autocast",
    "AMP203",
    source=(
        "https://github.com/pytorch/pytorch/issues/42218",
        "https://github.com/pytorch/pytorch/pull/58618",
        "https://github.com/NVIDIA/apex/issues/375",
    ),
    module="sampler",
    reason="autocast-never-entered",
    remedies=2,
    operands={"features": "float32", "grid": "float16"},
    marks={"raise": "raise"},
)
def sampling_outside_autocast(guard: Guard, repaired: int) -> None:
    class Sampler(nn.Module):
        def forward(self, features: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                with torch.autocast("cpu", dtype=torch.float16):
                    return F.grid_sample(features, grid, align_corners=False)
            if repaired == 2:
                return F.grid_sample(features, grid.float(), align_corners=False)
            return F.grid_sample(features, grid, align_corners=False)  # <- raise

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.sampler = Sampler()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sampler(self.conv(x), torch.zeros(2, 4, 4, 2).half())

    model = Net()
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "wavelet-filters-in-a-function",
    "AMP205",
    source=("https://github.com/ultralytics/yolov5/issues/12903",),
    module="down.dwt",
    reason="custom-function",
    operands={"x": "bfloat16", "filters": "float32"},
)
def wavelet_filters_in_a_function(guard: Guard, repaired: int) -> None:
    decorated = (
        torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32) if repaired else lambda method: method
    )

    class Analysis(torch.autograd.Function):
        @staticmethod
        @decorated
        def forward(ctx: Any, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(filters)
            with torch.autocast("cpu", enabled=False):
                return F.conv2d(x, filters, stride=2)  # <- raise

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu") if repaired else lambda method: method
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            (filters,) = ctx.saved_tensors
            return F.conv_transpose2d(gradient, filters, stride=2), None

    class Haar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filters", torch.full((4, 1, 2, 2), 0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Analysis.apply(x, self.filters * 1)

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)
            self.dwt = Haar()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dwt(self.conv(x))

    model = nn.Sequential()
    model.add_module("down", Down())
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(images())
        train(model, lambda: output)


@case(
    "float-attention-half-values",
    "AMP203",
    source=(
        "https://github.com/cv516Buaa/tph-yolov5/issues/11",
        "https://github.com/YJHCUI/SwinTransformer-YOLOv5/issues/3",
    ),
    module="",
    reason="autocast-never-entered",
    remedies=2,
    operands={"attention": "float32", "values": "float16"},
)
def float_attention_half_values(guard: Guard, repaired: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(rows())

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            attention = self.scale.softmax(-1)
            if repaired == 1:
                with torch.autocast("cpu", dtype=torch.float16):
                    return attention @ values
            if repaired == 2:
                return attention @ values.float()
            return attention @ values  # <- raise

    model = Attention()
    with guard(model):
        train(model, lambda: model(rows().half()))


@case(
    "recurrent-input",
    "AMP203",
    module="lstm",
    reason="autocast-never-entered",
    remedies=2,
    operands={"x": "float16", "lstm.weight_ih_l0": "float32"},
)
def recurrent_input(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, sequence: torch.Tensor) -> torch.Tensor:
            x = sequence.half()
            if repaired == 1:
                with torch.autocast("cpu", dtype=torch.float16):
                    return self.lstm(x)[0]
            if repaired == 2:
                return self.lstm(x.float())[0]
            return self.lstm(x)[0]  # <- raise

    model = Net()
    with guard(model):
        train(model, lambda: model(rows().unsqueeze(1)))


@case(
    "another-thread",
    "AMP203",
    module="head",
    reason="other-thread",
    operands={"features": "bfloat16", "head.weight": "float32", "head.bias": "float32"},
)
def another_thread(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.body(x)

            def replica() -> torch.Tensor:
                if repaired:
                    with torch.autocast("cpu", dtype=BF16):
                        return self.head(features)
                return self.head(features)  # <- raise

            with ThreadPoolExecutor(1) as pool:
                return pool.submit(replica).result()

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(rows()))


@case(
    "extension-op-in-half",
    "AMP205",
    source=(
        "https://github.com/open-mmlab/mmcv/issues/2011",
        "https://github.com/IDEA-Research/DINO/issues/59",
        "https://github.com/open-mmlab/mmdetection/issues/6082",
        "https://github.com/tenstorrent/tt-forge-models/pull/324",
        "https://github.com/intel/torch-xpu-ops/issues/713",
    ),
    module="deform",
    reason="custom-function",
    needs=("torchvision",),
    operands={"x": "bfloat16", "offset": "bfloat16", "weight": "bfloat16", "mask": "bfloat16", "bias": "bfloat16"},
    evidence={"op": "torchvision::deform_conv2d", "function": "DeformConv"},
)
def extension_op_in_half(guard: Guard, repaired: int) -> None:
    from torchvision.ops import deform_conv2d

    cast = {"cast_inputs": torch.float32} if repaired else {}

    class DeformConv(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", **cast)
        def forward(ctx: Any, x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.shape = x.shape
            return deform_conv2d(x, offset, weight)  # <- raise

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient.mean() * torch.ones(ctx.shape), None, None

    class Deform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return DeformConv.apply(x, torch.zeros(2, 18, 6, 6).to(x.dtype), self.weight.to(x.dtype))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.deform = Deform()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deform(self.conv(x))

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(images())
        train(model, lambda: output)


@case(
    "op-unknown-to-autocast",
    "AMP206",
    module="",
    reason="op-unknown-to-autocast",
    needs=("torchvision",),
    evidence={"op": "torchvision::deform_conv2d", "autocast_rule": False},
    operands={"features": "float16", "offset": "float32", "weight": "float32", "mask": "float16", "bias": "float16"},
)
def op_unknown_to_autocast(guard: Guard, repaired: int) -> None:
    from torchvision.ops import deform_conv2d

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)
            self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.conv(x)
            offset = torch.zeros(2, 18, 6, 6)
            if repaired:
                return deform_conv2d(features.float(), offset, self.weight)
            return deform_conv2d(features, offset, self.weight)  # <- raise

    model = Net()
    with guard(model), torch.autocast("cpu", dtype=torch.float16):
        train(model, lambda: model(images()))


@case(
    "distance-in-half",
    "AMP207",
    source=(
        "https://github.com/pytorch/pytorch/issues/136748",
        "https://github.com/pytorch/pytorch/issues/29528",
    ),
    module="matcher",
    operands={"boxes": "float16", "targets": "float16"},
)
def distance_in_half(guard: Guard, repaired: int) -> None:
    class Matcher(nn.Module):
        def forward(self, boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if repaired:
                return torch.cdist(boxes.float(), targets.float(), p=1)
            return torch.cdist(boxes, targets, p=1)  # <- raise

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.matcher = Matcher()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.float16):
                boxes = self.head(x)
            return self.matcher(boxes, torch.ones(2, 4).half())

    model = Net()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "bfloat16-to-numpy", "AMP212", module="", operands={"scores": "bfloat16"}, marks={"raise": "raise", "cast": "made"}
)
def bfloat16_to_numpy(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.fc(x)
            scores = output.detach()  # <- made
            self.highest = scores.float().numpy() if repaired else scores.numpy()  # <- raise
            return output

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "loss-outside-autocast",
    "AMP203",
    source=("https://github.com/Megvii-BaseDetection/YOLOX/issues/731",),
    module=None,
    reason="autocast-never-entered",
    remedies=2,
    operands={"probabilities": "float16", "targets": "float32"},
)
def loss_outside_autocast(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).sigmoid()

    model = Net()

    def step() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            probabilities = model(rows())
        targets = torch.ones(4, 2)
        if repaired == 1:
            with torch.autocast("cpu", dtype=torch.float16):
                return F.binary_cross_entropy(probabilities, targets)
        if repaired == 2:
            probabilities = probabilities.float()
        return F.binary_cross_entropy(probabilities, targets)  # <- raise

    with guard(model):
        train(model, step)


@case(
    "evaluation-without-autocast",
    "AMP203",
    source=("https://github.com/hiyouga/ChatGLM-Efficient-Tuning/issues/261",),
    module="head",
    reason="autocast-never-entered",
    trains=False,
    remedies=2,
    operands={"features": "bfloat16", "head.weight": "float32", "head.bias": "float32"},
)
def evaluation_without_autocast(guard: Guard, repaired: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(features)  # <- raise

    model = Net()
    features = rows().bfloat16()
    with torch.autocast("cpu", dtype=BF16):
        train(model, lambda: model(features))
    with guard(model, phase="validation_step"), torch.no_grad():
        if repaired == 1:
            with torch.autocast("cpu", dtype=BF16):
                model(features)
        else:
            model(features.float() if repaired else features)


@case(
    "anchors-clamped-by-a-float",
    "AMP209",
    source=(
        "https://github.com/ultralytics/yolov5/issues/8314",
        "https://github.com/ultralytics/yolov5/issues/8644",
    ),
    module="detect",
    reason="in-place-or-out",
    operands={"gj": "int64", "gain": "float32"},
)
def anchors_clamped_by_a_float(guard: Guard, repaired: int) -> None:
    class Detect(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gain = torch.ones(7)
            gain[2:6] = torch.tensor(x.shape)[[3, 2, 3, 2]].float()
            gj = torch.tensor([9, 2])
            if repaired:
                gj.clamp_(0, (gain[3] - 1).to(gj.dtype))
            else:
                gj.clamp_(0, gain[3] - 1)  # <- raise
            return x[:, :, gj]

    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 3, 1))
    model.add_module("detect", Detect())
    with guard(model):
        train(model, lambda: model(images()))


@case(
    "spectrum-of-half",
    "AMP207",
    source=("https://github.com/thuml/Time-Series-Library/issues/761",),
    module="periods",
    operands={"x": "bfloat16"},
)
def spectrum_of_half(guard: Guard, repaired: int) -> None:
    class Periods(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                return torch.fft.rfft(x.float(), dim=1).abs()
            return torch.fft.rfft(x, dim=1).abs()  # <- raise

    model = nn.Sequential()
    model.add_module("embedding", nn.Linear(4, 4))
    model.add_module("periods", Periods())
    model.bfloat16()
    with guard(model):
        train(model, lambda: model(rows().bfloat16()))


@case(
    "low-precision-boxes-in-a-float-matcher",
    "AMP203",
    source=("https://github.com/facebookresearch/detr/issues/167",),
    module="matcher",
    reason="autocast-never-entered",
    remedies=2,
    operands={"scores": "bfloat16", "targets": "float32"},
)
def low_precision_boxes_in_a_float_matcher(guard: Guard, repaired: int) -> None:
    class Matcher(nn.Module):
        def forward(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if repaired == 1:
                with torch.autocast("cpu", dtype=BF16):
                    return scores @ targets
            if repaired == 2:
                return scores.float() @ targets
            return scores @ targets  # <- raise

    class Detr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.matcher = Matcher()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=BF16):
                scores = self.head(x)
            return self.matcher(scores, torch.ones(4, 2))

    model = Detr()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "positions-from-numpy",
    "AMP203",
    module="encoder",
    reason="autocast-never-entered",
    operands={"x": "float64", "encoder.weight": "float32", "encoder.bias": "float32"},
    marks={"raise": "raise", "cast": "made"},
)
def positions_from_numpy(guard: Guard, repaired: int) -> None:
    """A float64 buffer promotes what follows it, and no autocast would change that."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("positions", torch.linspace(0, 1, 4, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x) + self.positions  # <- made
            return self.encoder(x.float() if repaired else x)  # <- raise

    model = Net()
    with guard(model):
        train(model, lambda: model(rows()))


@case(
    "bfloat16-predictions-to-numpy",
    "AMP212",
    module="",
    # Before Python 3.11 a frame does not tell which part of the line it is at.
    operands={"the tensor" if sys.version_info >= (3, 11) else "output": "bfloat16"},
    evidence={"expression": "output.detach().softmax(-1)" + ".numpy()" * (sys.version_info >= (3, 11))},
)
def bfloat16_predictions_to_numpy(guard: Guard, repaired: int) -> None:
    """What the line calls before `numpy()` has to stay."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.fc(x)
            if repaired:
                self.highest = output.detach().softmax(-1).float().numpy()
            else:
                self.highest = output.detach().softmax(-1).numpy()  # <- raise
            return output

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)


@case(
    "noise-in-a-model-of-low-precision",
    "AMP203",
    module="head",
    reason="parameter-not-float32",
    operands={"x + noise": "float32", "head.weight": "bfloat16", "head.bias": "bfloat16"},
    remedies=2,
)
def noise_in_a_model_of_low_precision(guard: Guard, repaired: int) -> None:
    """Nothing in it is to be cast to float32, and there is no autocast to keep parameters in float32 for."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x)
            noise = torch.zeros(4, 4, dtype=torch.bfloat16 if repaired == 2 else torch.float32)
            if repaired:
                return self.head((x + noise).to(torch.bfloat16))
            return self.head(x + noise)  # <- raise

    model = Net().to(BF16)
    with guard(model):
        train(model, lambda: model(rows().to(BF16)))


@case(
    "row-written-from-a-call",
    "AMP209",
    module="",
    operands={"memory": "float32", "self.encode(x)": "bfloat16"},
    marks={"raise": "raise", "cast": "made"},
    remedies=2,
)
def row_written_from_a_call(guard: Guard, repaired: int) -> None:
    """No variable holds the source of the write."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            index = torch.arange(4)
            if repaired == 2:
                memory = torch.zeros(8, 2, dtype=torch.bfloat16)
                memory[index] = self.encode(x)
                return memory
            memory = torch.zeros(8, 2)  # <- made
            if repaired:
                memory[index] = self.encode(x).to(memory.dtype)
            else:
                memory[index] = self.encode(x)  # <- raise
            return memory

    model = Net()
    with guard(model):
        with torch.autocast("cpu", dtype=BF16):
            output = model(rows())
        train(model, lambda: output)
