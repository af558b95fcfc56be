"""Call sites of ops, taken cheaply: code objects and instructions now, lines and text when they are reported."""

from __future__ import annotations

from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from ampcheck.source.lines import is_library, is_ours, is_torch, qualified_name, remember_source, site_of, starts_step
from ampcheck.trace import Role, Site, Writer

_USER, _LIBRARY, _PYTORCH, _OPTIMIZER, _DATA_PARALLEL, _SHARDING, _CHECKPOINT, _ENGINE, _START = range(9)
_MARKED = {
    "/torch/distributed/fsdp/_": _SHARDING,
    "/torch/distributed/_composable/fsdp/": _SHARDING,
    "/torch/optim/": _OPTIMIZER,
    "/torch/nn/parallel/distributed.py": _DATA_PARALLEL,
    "/torch/utils/checkpoint.py": _CHECKPOINT,
    "/torch/autograd/graph.py": _ENGINE,
}

Instruction = tuple[CodeType, int]


class CallSite(NamedTuple):
    """A call: the innermost user frame, and the innermost library frame outside PyTorch that it led to.

    ``caller`` is the next user frame out, in case the first is the forward of a custom autograd function.
    """

    user: Instruction | None
    library: Instruction | None
    writer: Writer = "code"
    caller: Instruction | None = None

    def applied(self, function: Any) -> CallSite:
        """The line that applied ``function``, a custom autograd function, if this call is in its forward."""
        code = getattr(getattr(function, "forward", None), "__code__", None)
        return CallSite(self.caller, None) if self.user and self.caller and self.user[0] is code else self

    def site(self, role: Role, **fields: Any) -> Site | None:
        """The user's line, or the library's if no frame is the user's."""
        return site_at(self.user or self.library, role, fields)

    def library_site(self, role: Role, **fields: Any) -> Site | None:
        """The library's line that the user's line led to."""
        return site_at(self.library, role, fields) if self.user is not None else None


class CallSites:
    """Finds call sites.

    This runs for each op of a replayed step, so each code object is classified once, and equal call sites are one
    object. Code objects hash slowly: they are kept, and compared by identity.
    """

    def __init__(self) -> None:
        self._kinds: dict[int, int] = {}
        self._codes: list[CodeType] = []
        self._found: dict[tuple[int | str, ...], CallSite] = {}

    def find(self, frame: FrameType | None) -> CallSite:
        user: FrameType | None = None
        library: FrameType | None = None
        caller: FrameType | None = None
        writer: Writer = "code"
        kinds = self._kinds
        while frame is not None:
            code = frame.f_code
            kind = kinds.get(id(code), -1)
            if kind == -1:
                kind = self.kind(code)
            if kind == _PYTORCH:
                pass
            elif kind == _USER:
                if user is None:
                    user = frame
                    if not _is_function_forward(code):
                        break
                else:
                    caller = frame
                    break
            elif kind == _START:
                if library is not None or user is not None:
                    break
            elif user is not None:
                pass
            elif kind == _LIBRARY:
                library = library or frame
            elif kind == _OPTIMIZER:
                library, writer = None, "optimizer"
            elif kind == _DATA_PARALLEL:
                writer = "buffer-broadcast"
            elif kind == _SHARDING:
                writer = "parameter-gather"
            frame = frame.f_back
        key = (*_instruction_key(user), *_instruction_key(library), *_instruction_key(caller), writer)
        call_site = self._found.get(key)
        if call_site is None:
            call_site = CallSite(_instruction(user), _instruction(library), writer, _instruction(caller))
            self._found[key] = call_site
        return call_site

    def find_step(self, frame: FrameType | None) -> CallSite:
        """The call site of ``frame``, or inside any optimizer, the line that called its ``step``.

        An optimizer's closure owns its writes: between the two is a call that is not a method of the optimizer.
        """
        inner, call_site, called = frame, self.find(frame), frame
        while inner is not None:
            if self.kind(inner.f_code) == _OPTIMIZER:
                return self.find(inner) if called is None or _is_of_optimizer(called) else call_site
            called, inner = inner, inner.f_back
            if self.kind(called.f_code) == _ENGINE or _is_module_call(called.f_code):
                return call_site
        return call_site

    def in_checkpoint(self, frame: FrameType | None) -> bool:
        """Whether checkpointing called this, in the forward pass or in the recomputation."""
        while frame is not None:
            if self.kind(frame.f_code) == _CHECKPOINT:
                return True
            frame = frame.f_back
        return False

    def in_recomputation(self, frame: FrameType | None) -> bool:
        """Whether checkpointing is recomputing a forward pass inside the innermost backward pass."""
        while frame is not None:
            kind = self.kind(frame.f_code)
            if kind == _CHECKPOINT:
                return True
            if kind == _ENGINE and frame.f_code.co_name == "_engine_run_backward":
                return False
            frame = frame.f_back
        return False

    def kind(self, code: CodeType) -> int:
        kind = self._kinds.get(id(code))
        if kind is None:
            kind = self._kinds[id(code)] = _kind(code.co_filename)
            self._codes.append(code)
        return kind


def _is_of_optimizer(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_argcount > 0 and isinstance(frame.f_locals.get(code.co_varnames[0]), torch.optim.Optimizer)


def _is_module_call(code: CodeType) -> bool:
    return code.co_name == "_call_impl" and code.co_filename.endswith("module.py")


def _instruction(frame: FrameType | None) -> Instruction | None:
    if frame is None:
        return None
    remember_source(frame.f_code.co_filename, frame.f_globals)
    return frame.f_code, frame.f_lasti


def _instruction_key(frame: FrameType | None) -> tuple[int, int]:
    return (id(frame.f_code), frame.f_lasti) if frame is not None else (0, 0)


def _kind(file: str) -> int:
    if starts_step(file):
        return _START
    if is_torch(file) or is_ours(file):
        normal = file.replace("\\", "/")
        return next((kind for part, kind in _MARKED.items() if part in normal), _PYTORCH)
    return _LIBRARY if is_library(file) else _USER


def _is_function_forward(code: CodeType) -> bool:
    # A static method, as `autograd.Function` requires; no module's forward is one.
    return code.co_name == "forward" and (code.co_argcount == 0 or code.co_varnames[0] != "self")


def site_at(instruction: Instruction | None, role: Role, fields: dict[str, Any]) -> Site | None:
    """The line of an instruction."""
    if instruction is None:
        return None
    code, offset = instruction
    lines = (line for start, end, line in code.co_lines() if start <= offset < end and line is not None)
    site = site_of(code.co_filename, next(lines, code.co_firstlineno), qualified_name(code), role)
    return Site(**{**vars(site), **fields})
