"""Run the ops of extensions outside the dispatch mode below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ampcheck.observe.probes.containment import bare, own_frame_hidden
from ampcheck.observe.probes.dispatch import DispatchProbe, Given
from ampcheck.observe.probes.modes import tracing

_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_PYTORCHS_OWN = ("aten.", "prim.", "prims.", "c10d", "_c10d", "fsdp.", "symm_mem.")


class ExtensionOps(TorchFunctionMode):
    """Runs the ops of extensions outside the probe below, which logs each as one op.

    Their kernels may be PyTorch programs themselves, which neither autograd nor autocast would reach under the mode.
    """

    def __init__(self, probe: DispatchProbe) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._probe = probe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, _OPS) and not str(func).startswith(_PYTORCHS_OWN):
            return self._apart(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: Sequence[Given] = ()
        aside = False
        try:
            if not tracing():
                given = self._probe.given(func, args, kwargs)
                aside = self._probe.step_aside()
        except Exception as error:  # noqa: BLE001 - our fault must not become the training's
            self.error = self.error or bare(error)
        try:
            with own_frame_hidden:
                output = func(*args, **kwargs)
        finally:
            if aside:
                self._probe.step_back()
        if aside:
            self._probe.log_apart(func, given, output, sys._getframe(1))
        return output
