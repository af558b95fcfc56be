"""Open what a user calls an export, and say in one sentence why it cannot be compared on given inputs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ampcheck.export.graph import Exported
from ampcheck.export.program import Program
from ampcheck.export.torchscript import TorchScript, quiet
from ampcheck.export.values import Inputs
from ampcheck.observe.walk import dtype_name, module_names


def opened_export(exported: object, eager: nn.Module, *, trusted: bool) -> Exported:
    """The exported model behind an object or a path, with the names of ``eager``.

    Raises ``ValueError``, also for a file that runs code when it is loaded, unless it is ``trusted``.
    """
    opened = _opened(exported, trusted)
    first = module_names(eager)
    opened.names = {name: first[id(module)] for name, module in eager.named_modules(remove_duplicate=False)}
    opened.parameters = tuple(inspect.signature(eager.forward).parameters)
    return opened


def _opened(exported: object, trusted: bool) -> Exported:
    if isinstance(exported, torch.jit.ScriptModule):
        return TorchScript(exported)
    if isinstance(exported, ExportedProgram):
        return Program(exported)
    proto = getattr(exported, "model_proto", None)
    if proto is not None:
        return _onnx(None, proto)
    if not isinstance(exported, (str, os.PathLike)):
        raise ValueError(
            f"a {type(exported).__name__} is not an exported model: give a TorchScript module, an ExportedProgram, an "
            "ONNXProgram or the path of a file"
        )
    path = Path(exported)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".pt2" and not trusted:
        raise ValueError(
            f"{str(path)!r} can run code when it is loaded, since torch.export.load reads pickles: if you trust "
            "it, pass `trusted=True` or `--trusted`"
        )
    try:
        with quiet():
            return Program(torch.export.load(path)) if path.suffix == ".pt2" else TorchScript(torch.jit.load(str(path)))
    except Exception as error:
        kind = "a torch.export program" if path.suffix == ".pt2" else "a TorchScript module"
        raise ValueError(f"{str(path)!r} cannot be read as {kind}: {first_line(error)}") from error


def _onnx(path: Path | None, proto: Any = None) -> Exported:
    try:
        from ampcheck.export.onnx_file import OnnxModel

        return OnnxModel(path, proto)
    except ModuleNotFoundError as error:
        raise ValueError("onnxruntime is not installed, and without it an ONNX model cannot be run") from error


def check_inputs(eager: nn.Module, exported: Exported, given: Inputs) -> None:
    """Raise ``ValueError`` for inputs that one of the two models cannot run on."""
    try:
        inspect.signature(eager.forward).bind(*given.args, **given.kwargs)
    except TypeError as error:
        raise ValueError(f"the eager model does not take these inputs: {error}") from error
    count, arity = len(given.args) + len(given.kwargs), exported.arity()
    if arity is not None and not arity[0] <= count <= arity[1] and len(given.tensors) != arity[1]:
        takes = f"{arity[0]}" if arity[0] == arity[1] else f"{arity[0]} to {arity[1]}"
        raise ValueError(f"the {exported.format} takes {takes} inputs, not {count}")
    exported.check(given)
    _check_declared(exported, given)
    devices = {tensor.device for tensor in given.tensors}
    for model, called in ((eager, "the eager model"), (exported.module, f"the {exported.format}")):
        held = {tensor.device for tensor in (*model.parameters(), *model.buffers())} if model is not None else set()
        if len(held) == 1 and len(devices) == 1 and held != devices:
            raise ValueError(f"the inputs are on {next(iter(devices))}, and {called} is on {next(iter(held))}")


def _check_declared(exported: Exported, given: Inputs) -> None:
    said = exported.declared()
    if len(said) != len(given.tensors):
        return
    for declared, tensor in zip(said, given.tensors, strict=True):
        if declared.dtype is not None and declared.dtype != tensor.dtype:
            raise ValueError(
                f"input {declared.name!r} is {dtype_name(tensor.dtype)}, and the {exported.format} takes "
                f"{dtype_name(declared.dtype)}"
            )
        if declared.shape is not None and not _fits(tensor, declared.shape):
            sizes = ", ".join("any" if size is None else str(size) for size in declared.shape)
            raise ValueError(
                f"input {declared.name!r} has the shape {list(tensor.shape)}, and the {exported.format} takes [{sizes}]"
            )


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )


def check_dtype(exported: Exported, given: Inputs, error: Exception) -> None:
    """Raise ``ValueError`` if the inputs' dtype is why the exported model raised ``error``."""
    module = exported.module
    held = {p.dtype for p in module.parameters() if p.is_floating_point()} if module is not None else set()
    inputs = {tensor.dtype for tensor in given.tensors if tensor.is_floating_point()}
    if len(held) == 1 and len(inputs) == 1 and held != inputs:
        raise ValueError(
            f"the inputs are {dtype_name(inputs.pop())}, and the {exported.format} computes in {dtype_name(held.pop())}"
        ) from error


def first_line(error: BaseException) -> str:
    """The message of an error in one line: the last one that names an error, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line]
    return (told[-1] if told else lines[0]).rstrip(".") if lines else type(error).__name__
