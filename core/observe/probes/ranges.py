"""How much of float16's range a step uses: the largest outputs of modules, and the gradients."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ampcheck.observe.probes.containment import contained
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.probes.modules import on_module_calls
from ampcheck.observe.tensors import PLAIN, tensors_in
from ampcheck.observe.walk import module_names
from ampcheck.trace import Gradients

_SAMPLE = 64


class RangeProbe:
    """Measures a step in float16. It keeps numbers on their device, and copies them at the end, once.

    ``outputs`` has the largest finite magnitude of the float16 outputs of each module, by name. ``gradients`` are those
    that the optimizer's first step took, unscaled, in a sample of each parameter's elements.
    """

    def __init__(self, model: nn.Module, scale: Callable[[], float | None]) -> None:
        self.error: Exception | None = None
        self.outputs: dict[str, float] = {}
        self.gradients: Gradients | None = None
        self._names = module_names(model)
        self._scale = scale
        self._largest: list[tuple[str, torch.Tensor]] = []
        self._sampled: list[torch.Tensor] = []
        self._thread = threading.get_ident()
        self._listening = Listening()
        self._end: Callable[[], None] | None = None

    def __enter__(self) -> RangeProbe:
        self._thread = threading.get_ident()
        self._end = on_module_calls(None, self._returned)
        self._listening.to(torch.optim.Optimizer._optimizer_step_code, before=self._will_step)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.end()
        if self._end is not None:
            self._end()
        self._copy()
        self._largest.clear()
        self._sampled.clear()

    @contained
    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = self._names.get(id(module))
        if name is None or threading.get_ident() != self._thread or torch._C._current_graph_task_id() != -1:
            return
        for tensor in tensors_in(output):
            if tensor.dtype is torch.float16 and type(tensor) in PLAIN and tensor.numel():
                with alone():
                    self._largest.append((name, tensor.detach().abs().amax()))

    @contained
    def _will_step(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        # Fused optimizers are given scaled gradients.
        if self._sampled or threading.get_ident() != self._thread or getattr(optimizer, "grad_scale", None) is not None:
            return
        with alone():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    gradient = parameter.grad
                    if gradient is None or type(gradient) not in PLAIN or gradient.is_sparse or not gradient.numel():
                        continue
                    flat = gradient.detach().reshape(-1)
                    self._sampled.append(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].float().abs())

    @contained
    def _copy(self) -> None:
        with alone():
            if self._largest:
                values = torch.stack([one.float() for _, one in self._largest]).tolist()
                for (name, _), value in zip(self._largest, values, strict=True):
                    if math.isfinite(value):
                        self.outputs[name] = max(value, self.outputs.get(name, 0.0))
            if self._sampled:
                self.gradients = _described(torch.cat(self._sampled), self._scale() or 1.0)


def _described(values: torch.Tensor, scale: float) -> Gradients | None:
    if not bool(torch.isfinite(values).all()):
        return None
    nonzero = values[values > 0]
    if not nonzero.numel():
        return Gradients(values.numel(), values.numel(), 0, 0.0, 0.0, scale)
    tiny = torch.finfo(torch.float16).smallest_normal
    return Gradients(
        values.numel(),
        values.numel() - nonzero.numel(),
        int((nonzero * scale < tiny).sum()),
        float(nonzero.quantile(0.05)),
        float(nonzero.max()),
        scale,
    )
