"""Calls of autocast with arguments it does not take."""

from __future__ import annotations

import functools

import torch
from torch import nn

from cases import Cases, Guard
from cases.training import train

CASES = Cases(family="autocast")
case = CASES.case


def digits() -> torch.Tensor:
    return torch.linspace(0, 1, 8).reshape(2, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)


@case(
    "autocast-device-keyword",
    "AMP102",
    source=("https://github.com/roboflow/rf-detr/issues/52",),
    module="",
    reason="device-keyword",
    evidence={"argument": "device", "corrected": "torch.autocast(device_type='cpu', dtype=torch.bfloat16)"},
)
def device_keyword(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
                    return self.fc(x)
            with torch.autocast(device="cpu", dtype=torch.bfloat16):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-kwargs-in-a-dict",
    "AMP102",
    source=("https://github.com/roboflow/rf-detr/issues/52",),
    module="head",
    reason="device-keyword",
    marks={"raise": "raise", "call": "dict"},
    evidence={
        "argument": "device",
        "value": "'cpu'",
        "kwargs_variable": "self.amp_kwargs",
        "corrected": "self.amp_kwargs = dict(device_type='cpu', dtype=torch.bfloat16)",
    },
)
def kwargs_in_a_dict(guard: Guard, repaired: int) -> None:
    class Head(Net):
        def __init__(self) -> None:
            super().__init__()
            self.amp_kwargs = dict(device="cpu", dtype=torch.bfloat16)  # noqa: C408  # <- dict

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(**self.amp_kwargs):  # <- raise
                return self.fc(x)

    model = nn.Sequential()
    model.add_module("head", Head())
    if repaired:
        model.head.amp_kwargs = {"device_type": "cpu", "dtype": torch.bfloat16}
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-kwargs-from-a-function",
    "AMP102",
    source=("https://github.com/roboflow/rf-detr/issues/52",),
    module="",
    reason="device-type-keyword",
    marks={"raise": "raise", "call": "return"},
    evidence={
        "argument": "device_type",
        "kwargs_variable": "autocast_args()",
        "corrected": "torch.autocast(**autocast_args())",
    },
)
def kwargs_from_a_function(guard: Guard, repaired: int) -> None:
    def autocast_args() -> dict[str, object]:
        return {"device_type": "cpu", "enabled": True, "dtype": torch.bfloat16}  # <- return

    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(**autocast_args()):
                    return self.fc(x)
            with torch.cpu.amp.autocast(**autocast_args()):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-cuda-device-type",
    "AMP102",
    module="",
    # The remedy keeps the device: where there is no GPU that is said next.
    also=("AMP103",),
    reason="device-type-keyword",
    evidence={
        "deprecated": "torch.cuda.amp.autocast",
        "corrected": "torch.autocast(device_type='cuda', dtype=torch.bfloat16)",
    },
)
def cuda_device_type(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
                    return self.fc(x)
            with torch.cuda.amp.autocast(device_type="cuda", dtype=torch.bfloat16):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-device-object",
    "AMP102",
    module="",
    reason="device-not-a-string",
    evidence={"value": "x.device", "corrected": "torch.autocast(device_type=x.device.type, dtype=torch.bfloat16)"},
)
def device_object(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(device_type=x.device.type, dtype=torch.bfloat16):
                    return self.fc(x)
            with torch.autocast(x.device, dtype=torch.bfloat16):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-unknown-device",
    "AMP102",
    module="",
    reason="unknown-device",
    evidence={"device": "gpu", "corrected": "torch.autocast(device_type='cpu', dtype=torch.bfloat16)"},
)
def unknown_device(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
                    return self.fc(x)
            with torch.autocast("gpu", dtype=torch.bfloat16):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-no-device-type",
    "AMP102",
    module="",
    reason="no-device-type",
    marks={"raise": "raise", "call": "dict"},
    evidence={"kwargs_variable": "kwargs", "corrected": "kwargs = {'device_type': 'cpu', 'dtype': torch.bfloat16}"},
)
def no_device_type(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                kwargs = {"device_type": "cpu", "dtype": torch.bfloat16}
                with torch.autocast(**kwargs):
                    return self.fc(x)
            kwargs = {"dtype": torch.bfloat16}  # <- dict
            with torch.autocast(**kwargs):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-partial",
    "AMP102",
    module="",
    reason="device-keyword",
    marks={"raise": "raise", "call": "partial"},
    evidence={
        "kwargs_variable": "amp_autocast",
        "corrected": "amp_autocast = functools.partial(torch.autocast, device_type='cpu', dtype=torch.bfloat16)",
    },
)
def partial(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                corrected = functools.partial(torch.autocast, device_type="cpu", dtype=torch.bfloat16)
                with corrected():
                    return self.fc(x)
            amp_autocast = functools.partial(torch.autocast, device="cpu", dtype=torch.bfloat16)  # <- partial
            with amp_autocast():  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-misspelt-keyword",
    "AMP102",
    module="",
    reason="unexpected-keyword",
    evidence={"argument": "enable", "corrected": "torch.autocast(device_type='cpu', enabled=True)"},
)
def misspelt_keyword(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if repaired:
                with torch.autocast(device_type="cpu", enabled=True):
                    return self.fc(x)
            with torch.autocast("cpu", enable=True):  # <- raise
                return self.fc(x)

    model = Model()
    with guard(model):
        train(model, lambda: model(digits()))


@case(
    "autocast-device-keyword-compiled",
    "AMP102",
    module="",
    reason="device-keyword",
    marks={"raise": "raise", "call": "dict"},
    evidence={"kwargs_variable": "self.amp", "corrected": "self.amp = dict(device_type='cpu', dtype=torch.bfloat16)"},
)
def compiled(guard: Guard, repaired: int) -> None:
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.amp = dict(device="cpu", dtype=torch.bfloat16)  # noqa: C408  # <- dict

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(**self.amp):  # <- raise
                return self.fc(x)

    model = Model()
    if repaired:
        model.amp.pop("device")  # type: ignore[arg-type]
        model.amp["device_type"] = "cpu"
    torch._dynamo.reset()
    compiled_model = torch.compile(model, backend="eager")
    try:
        with guard(compiled_model):
            train(compiled_model, lambda: compiled_model(digits()))
    finally:
        torch._dynamo.reset()
