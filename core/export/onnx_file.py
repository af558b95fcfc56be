"""Run ONNX models with onnxruntime, and look into them with onnx if that is installed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ampcheck.export.eager import Call
from ampcheck.export.graph import Cast, Constant, Exported, TrainingOp, Value, Visible, pooled
from ampcheck.export.values import Inputs, other_size
from ampcheck.observe.walk import dtype_name
from ampcheck.source.lines import is_library, is_torch, site_of
from ampcheck.trace import OpaqueCall, Site

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(bool)": torch.bool,
}
_LOW_TYPES = {10: torch.float16, 16: torch.bfloat16}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


class OnnxModel(Exported):
    """An ONNX file, or the program ``torch.onnx.export`` returns."""

    format = "ONNX model"
    practice = "onnx"

    def __init__(self, path: str | Path | None, proto: Any = None) -> None:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]

        self._runtime = onnxruntime
        self._source: Any = str(path) if path is not None else proto.SerializeToString()
        try:
            self._session = self._open(self._source, optimized=True)
        except Exception as error:
            raise ValueError(f"onnxruntime cannot load the ONNX model: {str(error).splitlines()[0]}") from error
        self._proto = proto if proto is not None else _load(path)

    def check(self, inputs: Inputs) -> None:
        self._feed(inputs)

    def declared(self) -> tuple[Visible, ...]:
        return tuple(
            Visible(
                argument.name,
                _DTYPES.get(argument.type),
                tuple(size if isinstance(size, int) else None for size in argument.shape),
            )
            for argument in self._session.get_inputs()
        )

    def resized_shapes(self, inputs: Inputs, *, double: bool = False) -> list[tuple[int, ...]] | None:
        chosen: dict[str, int] = {}
        shapes = []
        feed = self._feed(inputs)
        for argument in self._session.get_inputs():
            given = feed[argument.name].shape
            sizes = []
            for declared, size in zip(argument.shape, given, strict=True):
                name = declared if isinstance(declared, str) else None
                sizes.append(chosen.setdefault(name, other_size(size, None, double=double)) if name else size)
            shapes.append(tuple(sizes))
        return shapes if chosen else None

    def run(self, inputs: Inputs) -> Any:
        return tuple(map(_tensor, self._session.run(None, self._feed(inputs))))

    def calls(self, inputs: Inputs, seed: int) -> tuple[list[Call], str | None]:
        if self._proto is None:
            return [], "onnx is not installed, and the model cannot be inspected without it"
        model = type(self._proto)()
        model.CopyFrom(self._proto)
        places = {output: self._stack(node) for node in model.graph.node for output in node.output}
        if not any(len(modules) > 1 for modules in places.values()):
            return [], "the nodes of the ONNX model do not name the modules they came from"
        outputs = {output.name for output in model.graph.output}
        users: dict[str, list[tuple[str, ...] | None]] = {name: [None] for name in outputs}
        for node in model.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(self._stack(node))
        wanted = [
            name
            for name, modules in places.items()
            if name and any(user is None or user != modules for user in users.get(name, []))
        ]
        for name in wanted:
            if name not in outputs:
                model.graph.output.add().name = name
        session = self._open(self._serialized(model), optimized=False)
        feed = self._feed(inputs)
        try:
            arrays = session.run(None, feed)
        except Exception as error:  # noqa: BLE001 - whatever the runtime raises
            return [], f"the ONNX model stopped: {str(error).splitlines()[0]}"
        found = dict(zip((o.name for o in session.get_outputs()), arrays, strict=True))
        values = [Value(_tensor(array), ("",), users.get(name, [])) for name, array in feed.items()]
        order = [name for node in model.graph.node for name in node.output if name in found]
        values += [
            Value(_tensor(found[name]), places[name], users.get(name, []))
            for name in order
            if isinstance(found[name], np.ndarray)
        ]
        return pooled(values, self.named), None

    def constants(self) -> Iterator[Constant]:
        if self._proto is None:
            return
        from onnx import numpy_helper  # type: ignore[import-not-found,unused-ignore]

        consumers = {name: node for node in reversed(self._proto.graph.node) for name in node.input}
        for initializer in self._proto.graph.initializer:
            user = consumers.get(initializer.name)
            module = self._place(user) if user is not None else ""
            yield Constant(module, _tensor(numpy_helper.to_array(initializer)), _site(user))
        for node in self._proto.graph.node:
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        yield Constant(self._place(node), _tensor(numpy_helper.to_array(attribute.t)), _site(node))

    def opaque_calls(self) -> Iterator[OpaqueCall]:
        if self._proto is None:
            return
        defined = {(function.domain, function.name) for function in self._proto.functions}
        for node in self._proto.graph.node:
            if node.domain not in _STANDARD and (node.domain, node.op_type) not in defined:
                yield OpaqueCall("no-schema", f"{node.domain}::{node.op_type}", self._place(node), _site(node))

    def casts(self) -> Iterator[Cast]:
        for node in self._proto.graph.node if self._proto is not None else ():
            if node.op_type == "Cast":
                to = next((a.i for a in node.attribute if a.name == "to"), 0)
                if to in _LOW_TYPES:
                    yield Cast(self._place(node), dtype_name(_LOW_TYPES[to]), _site(node))

    def training_ops(self) -> Iterator[TrainingOp]:
        if self._proto is None:
            return
        true = set()
        for node in self._proto.graph.node:
            if node.op_type == "Constant" and any(a.name == "value" and any(a.t.raw_data) for a in node.attribute):
                true.add(node.output[0])
        true |= {i.name for i in self._proto.graph.initializer if any(i.raw_data) or any(i.int32_data)}
        for node in self._proto.graph.node:
            training = any(a.name == "training_mode" and a.i for a in node.attribute)
            if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in true:
                yield TrainingOp("dropout", self._place(node), _site(node))
            elif node.op_type == "BatchNormalization" and training:
                yield TrainingOp("batch_norm", self._place(node), _site(node))

    def _stack(self, node: Any) -> tuple[str, ...]:
        return self.chain(_parts(node))

    def _place(self, node: Any) -> str:
        return self.named(self._stack(node)[-1])

    def _open(self, source: Any, *, optimized: bool) -> Any:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if not optimized:
            options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return self._runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    @staticmethod
    def _serialized(model: Any) -> bytes:
        serialized: bytes = model.SerializeToString()
        return serialized

    def _feed(self, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
        names = [argument.name for argument in self._session.get_inputs()]
        tensors = inputs.tensors
        # The exporters drop inputs that the graph does not use.
        named = dict(zip(self.parameters, inputs.args, strict=False)) | dict(inputs.kwargs)
        if (not inputs.args or len(tensors) != len(names)) and all(isinstance(named.get(n), Tensor) for n in names):
            tensors = [named[name] for name in names]
        if len(tensors) != len(names):
            raise ValueError(f"the ONNX model takes {len(names)} tensors ({', '.join(names)}), not {len(tensors)}")
        return {name: _array(tensor) for name, tensor in zip(names, tensors, strict=True)}


def _load(path: str | Path | None) -> Any:
    try:
        import onnx  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        return None
    return onnx.load(str(path))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        raise ValueError("onnxruntime takes no bfloat16 input from Python")
    array: np.ndarray[Any, Any] = np.ascontiguousarray(tensor.numpy())
    return array


def _tensor(array: Any) -> Any:
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array)) if array.dtype.kind in "fiubc" else array


def _parts(node: Any) -> list[str]:
    """The modules a node came from, by the exporter's metadata, else by its name (``/layer1/layer1.0/conv1/Conv``)."""
    if node is None:
        return []
    parts = node.name.split("/")[1:-1] if node.name.startswith("/") else []
    for entry in node.metadata_props if hasattr(node, "metadata_props") else ():
        if entry.key == "pkg.torch.onnx.name_scopes":
            parts = [re.sub(r"@\d+", "", scope) for scope in ast.literal_eval(entry.value)[:-1] if scope]
    return parts


def _site(node: Any) -> Site | None:
    for entry in getattr(node, "metadata_props", ()) if node is not None else ():
        if entry.key == "pkg.torch.onnx.stack_trace":
            outside: Site | None = None
            for match in reversed(list(_FRAME.finditer(entry.value))):
                if not is_library(match["file"]):
                    return site_of(match["file"], int(match["line"]), match["function"])
                if outside is None and not is_torch(match["file"]):
                    outside = site_of(match["file"], int(match["line"]), match["function"])
            return outside
    return None
