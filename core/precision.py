"""The precision that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["mixed", "true", "unknown"]
Means = Literal["autocast", "policy"]

LOW_PRECISION = frozenset({"float16", "bfloat16"})
FLOATING = LOW_PRECISION | {"float32", "float64"}


@dataclass(frozen=True)
class Precision:
    """The numerical precision a training run declares, before anything has run.

    ``mode`` is ``"mixed"`` (float32 parameters under autocast), ``"true"`` (the parameters themselves have ``dtype``
    and no autocast is used) or ``"unknown"`` (nothing was declared; what is observed decides). Dtypes are PyTorch's
    names without the ``torch.`` prefix. ``source`` quotes the place where the user said so.

    ``effective_dtype`` is the dtype that a host uses instead of the one asked for, by a documented rule of its own;
    ``evaluation_dtype`` is the one it evaluates in by default (``"float32"``: autocast off). A difference they explain
    is information, not a fault. ``explicit`` is false if the user left the host's default.

    ``by`` says how mixed precision comes about: through ``"autocast"``, or through ``"policy"`` if the policy of a
    sharded model casts parameters and inputs for each forward pass, so that no autocast is needed.
    """

    mode: Mode = "unknown"
    device_type: str | None = None
    dtype: str | None = None
    scaler: bool | None = None
    source: str = ""
    effective_dtype: str | None = None
    evaluation_dtype: str | None = None
    explicit: bool = True
    by: Means = "autocast"

    @property
    def mixed(self) -> bool:
        return self.mode == "mixed"

    def __str__(self) -> str:
        if self.mode == "unknown":
            return "precision not declared"
        words = [self.mode, self.dtype or "default dtype"]
        if self.device_type:
            words += ["on", self.device_type]
        if self.by == "policy":
            words.append("by a sharding policy")
        text = " ".join(words)
        if self.mixed and self.scaler is not None:
            text += f", loss scaling {'on' if self.scaler else 'off'}"
        return text
