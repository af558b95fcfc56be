"""Why an export died, by what PyTorch says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from traceback import extract_tb

from ampcheck.source.lines import is_library, is_ours, is_torch, site_of
from ampcheck.source.printable import shown
from ampcheck.trace import ExportFailure, ExportFault, Site

# In the order in which they are looked for; the group, if there is one, is what the failure is about.
_SIGNS: tuple[tuple[ExportFault, str], ...] = (
    ("python-call", r"Could not export Python function call '(?P<detail>\w+)'"),
    ("python-call", r"torch[/\\]autograd[/\\]function\.py\""),
    ("unregistered-tensor", r"Cannot insert a Tensor that requires grad as a constant"),
    ("data-dependent-number", r"Could not extract specialized integer from data-dependent expression"),
    ("data-dependent-branch", r"Could not guard on data-dependent expression"),
    ("data-dependent-branch", r"Data-dependent branching|Dynamic control flow is not supported"),
    ("left-dispatcher", r"\.numpy\(\) is not supported for tensor subclasses"),
    ("left-dispatcher", r"Cannot access data pointer of Tensor \(e\.g\. FakeTensor"),
    ("no-fake-kernel", r"There was no fake impl registered for .*?(?P<detail>[\w.]+::?\w+)"),
    ("no-fake-kernel", r"(?P<detail>\w+::\w+): attempted to run this operator with Meta tensors"),
    ("newer-opset", r"Exporting the operator '(?P<detail>[^']+)' to ONNX opset version \d+ is not supported.*added in "
     r"version (?P<opset>\d+)"),
    ("no-onnx-operator", r"Exporting the operator '(?P<detail>[^']+)' to ONNX opset version \d+ is not supported"),
    ("no-onnx-operator", r"No ONNX function found for <OpOverload\(op='(?P<detail>[^']+)'"),
    ("not-a-tensor", r"Only tensors, lists, tuples of tensors, or dictionary of tensors can be output from traced"),
    ("not-a-tensor", r"Tracer cannot infer type of|Encountering a dict at the output of the tracer"),
    ("not-in-torchscript", r"\A\s*(?P<detail>[^\n]*?)\s*:?\s*\n.*<--- HERE"),
)  # fmt: skip
_LONGEST = 200
_NUMBER, _BRANCH = re.compile(r"\b(int|float|item|tolist)\("), re.compile(r"\b(if|elif|while|assert|and|or|not)\b")
_LOW_TENSOR = re.compile(r"\[ \w*(?:BFloat16|Half)\w*(?:\.\w+)?\{")
# As Python writes a place, as TorchScript writes it in a graph, and as the export's guards do.
_PLACES = re.compile(
    r'File "(?P<file>[^"\n]+)", line (?P<line>\d+)(?:, in (?P<function>[\w.<>]+))?'
    r"|^\s*\(?(?P<traced>[^\s():]+)\((?P<at>\d+)\): (?P<called>[\w.<>]+)",
    re.MULTILINE,
)


def export_failure(function: str, error: BaseException, *, autocast: bool) -> ExportFailure:
    """Take apart what the export ``function`` raised. ``autocast``: it ran in an autocast region."""
    chain = list(_chain(error))
    texts = [_text(one) for one in chain]
    fault, detail, text = _fault(texts)
    if fault == "unregistered-tensor" and autocast and _LOW_TENSOR.search(text):
        fault = "autocast-cache"
    message = next((line.strip() for line in text.splitlines() if line.strip()), "")
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
    sites = _sites(chain, texts) if fault is not None else ()
    line = sites[0].code if sites else ""
    if fault == "data-dependent-branch" and _NUMBER.search(line) and not _BRANCH.search(line):
        fault = "data-dependent-number"
    return ExportFailure(function, type(error).__name__, shown(message), fault, shown(detail), sites)


def _fault(texts: list[str]) -> tuple[ExportFault | None, str, str]:
    """The cause, what it is about, and the message that tells it, innermost first."""
    for fault, pattern in _SIGNS:
        for text in reversed(texts):
            match = re.search(pattern, text, re.DOTALL)
            if match is not None:
                found = match.groupdict()
                return fault, found.get("opset") or found.get("detail") or "", text
    return None, "", texts[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a user's __str__ may fail
        return ""


def _sites(chain: list[BaseException], texts: list[str]) -> tuple[Site, ...]:
    """The line of the model that the export stopped at, from the frames below the export, or else from a message."""
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for error in reversed(chain)
        for frame in reversed(extract_tb(error.__traceback__))
    ]
    told = [
        (match["file"] or match["traced"], int(match["line"] or match["at"]), match["function"] or match["called"])
        for text in reversed(texts)
        for match in _PLACES.finditer(text)
    ]
    for foreign in (is_library, is_torch):
        for file, line, function in (*frames, *told):
            if not foreign(file) and not is_ours(file) and os.path.exists(file):
                return (site_of(file, line, function or "forward", "raise"),)
    return ()
