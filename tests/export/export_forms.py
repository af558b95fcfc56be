"""A model in its exported forms."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import nn

FORMS = ("trace", "program", "onnx")


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...], form: str, folder: Path) -> object:
    """What the user would hand to ``ampcheck.compare``; an ONNX model is a file in ``folder``."""
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if form == "trace":
            return torch.jit.trace(model, inputs, check_trace=False)
        if form == "script":
            return torch.jit.script(model)
        if form == "program":
            return torch.export.export(model, inputs)
        file = folder / "model.onnx"
        torch.onnx.export(model, inputs, str(file), dynamo=form != "onnx-legacy")
        return file
