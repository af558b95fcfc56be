"""Dtypes as PyTorch's messages spell them."""

from __future__ import annotations

import re

_NAMES = {
    "half": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "double": "float64",
    "complexhalf": "complex32",
    "complexfloat": "complex64",
    "complexdouble": "complex128",
    "char": "int8",
    "byte": "uint8",
    "short": "int16",
    "int": "int32",
    "long": "int64",
    "bool": "bool",
}


def canonical(spelling: str | None) -> str | None:
    """``float16`` for ``Half``, ``c10::Half``, ``torch.cuda.HalfTensor``, ``CPUHalfType`` or ``torch.float16``;
    ``None`` for anything that is not a dtype."""
    if spelling is None:
        return None
    word = spelling.removeprefix("struct ").rpartition("::")[2].rpartition(".")[2]
    word = re.sub(r"^(?:CPU|CUDA|XPU|MPS|Meta)(?=[A-Z])|(?<=[a-z0-9])(?:Tensor|Type)$", "", word)
    return _NAMES.get(word.lower(), word if word in _NAMES.values() else None)
