"""One eager model under two settings, module by module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ampcheck.export.eager import Call, modules_run
from ampcheck.export.kernels import plain_kernels
from ampcheck.export.runs import module_errors
from ampcheck.export.values import APART, Inputs, Tolerances, distance, named_tensors
from ampcheck.observe.walk import dtype_name, environment, unwrapped, walk
from ampcheck.report import Report
from ampcheck.trace import Comparison, OutputError, Trace


@dataclass(frozen=True)
class Setting:
    """How to run a model.

    ``autocast`` is the autocast dtype (``None``: off). ``device`` is where a copy of the model and the inputs go
    (``None``: where they are). ``dtype`` is what a copy of the model and the floating-point inputs are cast to.
    ``plain_kernels`` takes the plain PyTorch path of custom kernels (true, or what ``ampcheck.plain_kernels`` takes).
    """

    autocast: torch.dtype | None = None
    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    plain_kernels: bool | Mapping[str, Callable[..., Any]] = False

    def __str__(self) -> str:
        parts = [f"autocast {dtype_name(self.autocast)}"] if self.autocast else []
        parts += [dtype_name(self.dtype)] if self.dtype else []
        parts += [f"on {self.device}"] if self.device is not None else []
        parts += ["plain kernels"] if self.plain_kernels else []
        return ", ".join(parts) or "as it is"


def compare_settings(
    model: nn.Module,
    inputs: object,
    second: Setting,
    first: Setting = Setting(),
    *,
    seed: int = 0,
) -> Report:
    """Run ``model`` on ``inputs`` under two settings and compare the outputs of every module.

    For example: float32 against the autocast setting of the run, one device against another, or a custom kernel against
    its plain path.

    Nothing is judged: ``report.comparison.modules`` are the calls in execution order with their relative errors,
    ``report.comparison.ranked()`` the worst first, and ``str(report)`` shows the table. Raises ``ValueError`` if the
    model does not run on the inputs.
    """
    model = unwrapped(model)
    given = Inputs.of(inputs)
    low = next((s.autocast or s.dtype for s in (second, first) if s.autocast or s.dtype), None)
    tolerances = Tolerances("torch")
    if low is not None:
        known = tolerances.of(low)
        tolerances = Tolerances("torch", known.relative, known.absolute, low)
    runs = [_run(model, given, setting, seed) for setting in (first, second)]
    expected, found = (named_tensors(outputs) for outputs, _ in runs)
    outputs = []
    for name, tensor in expected.items():
        apart = distance(tensor, found[name], tolerances) if name in found else APART
        shape = tuple(tensor.shape)
        outputs.append(
            OutputError(name, dtype_name(tensor.dtype), shape, apart.absolute, apart.relative, apart.equal, given.name)
        )
    comparison = Comparison(
        first=str(first),
        second=str(second),
        outputs=tuple(outputs),
        modules=tuple(module_errors(runs[0][1], runs[1][1], tolerances)),
        tolerances=tuple(tolerances.used.values()),
        inputs=(given.name,),
        export=False,
    )
    return Report(Trace(environment=environment(), model=walk(model), comparison=comparison))


def _run(model: nn.Module, inputs: Inputs, setting: Setting, seed: int) -> tuple[Any, list[Call]]:
    if setting.device is not None or setting.dtype is not None:
        model = copy.deepcopy(model).to(device=setting.device, dtype=setting.dtype)

        def moved(_: int, tensor: Tensor) -> Tensor:
            return tensor.to(setting.device, setting.dtype if tensor.is_floating_point() else None)

        inputs = inputs.map(moved, inputs.name)
    device_type = inputs.tensors[0].device.type
    with contextlib.ExitStack() as stack:
        if setting.autocast is not None:
            stack.enter_context(torch.autocast(device_type, dtype=setting.autocast))
        if setting.plain_kernels:
            stack.enter_context(plain_kernels(setting.plain_kernels if setting.plain_kernels is not True else None))
        try:
            return modules_run(model, inputs, seed)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the model does not run on the inputs ({setting}): {lines[0]}") from error
