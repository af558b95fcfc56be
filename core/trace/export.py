"""What became of the exports that a run made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ampcheck.trace.comparison import Comparison
from ampcheck.trace.site import Site

ExportFault = Literal[
    "python-call",
    "autocast-cache",
    "unregistered-tensor",
    "data-dependent-branch",
    "data-dependent-number",
    "left-dispatcher",
    "no-fake-kernel",
    "no-onnx-operator",
    "newer-opset",
    "not-in-torchscript",
    "not-a-tensor",
]


@dataclass(frozen=True)
class ExportFailure:
    """An export that raised. ``fault`` is the cause, if it is known, and ``detail`` the function, the operator or the
    expression that it is about. ``handled``: the program went on without it."""

    function: str
    type: str
    message: str
    fault: ExportFault | None = None
    detail: str = ""
    sites: tuple[Site, ...] = ()
    handled: bool = False


@dataclass(frozen=True)
class Export:
    """One call of ``function`` (``torch.jit.trace``) on a module of the class ``model``: what comparing its result with
    the module showed, why it was not compared (``left_out``), or its ``failure``."""

    function: str
    model: str
    site: Site | None = None
    comparison: Comparison | None = None
    left_out: str | None = None
    failure: ExportFailure | None = None
