"""From an exception to a ``Failure``, which holds no tensor and no frame."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from ampcheck.failure.frames import Frame, Scene, chain, frames_of, inner, phase_of, root_of, sites
from ampcheck.failure.signatures import SIGNATURES, Signature
from ampcheck.observe.walk import module_names, unwrapped
from ampcheck.trace import Failure, OperationFailure

__all__ = ["SIGNATURES", "Signature", "examine"]

# These are no failures of precision, whatever else the program was handling when they were raised.
_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.cuda.OutOfMemoryError)


def examine(exc: BaseException, *, model: nn.Module | None, phase: str, step: int | None) -> Failure:
    """Take ``exc`` apart. ``model`` is the model that trains, if known. ``phase`` and ``step`` say where the host saw
    the exception; the frames may say it more exactly. Never raises."""
    try:
        return _examine(exc, model, phase, step)
    except Exception as error:  # noqa: BLE001 (the user's exception must come through whatever happens here)
        return Failure(
            type(exc).__name__, _message(exc), phase, step, internal_error=f"{type(error).__name__}: {error}"
        )


def _message(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 (a user's __str__ may fail)
        return ""


def _examine(exc: BaseException, model: nn.Module | None, phase: str, step: int | None) -> Failure:
    links = tuple((type(link).__name__, _message(link)) for link, _ in chain(exc))
    model = unwrapped(model) if model is not None else None
    recognised = _recognise(exc, model)
    subject = recognised[0] if recognised else exc
    found = frames_of(subject, model)
    root = root_of(found, model)
    name, module_type = _module(found, root)
    facts = None
    if recognised:
        _, signature, match = recognised
        facts = signature.facts(Scene(subject, match.groupdict(), found, root))
    if name is None and isinstance(facts, OperationFailure) and facts.operation.function is not None:
        # In backward no frame belongs to the module; the tensors that it passed to its function identify it.
        name = facts.operation.function.module
    return Failure(
        type=type(exc).__name__,
        message=_message(exc),
        phase=phase_of(found, phase),
        step=step,
        facts=facts,
        chain=links,
        sites=sites(found),
        module=name,
        module_type=module_type,
    )


def _recognise(exc: BaseException, model: nn.Module | None) -> tuple[BaseException, Signature, re.Match[str]] | None:
    """The innermost known exception of the chain, with its signature. An exception that was only being handled when
    another known failure was raised is not its cause."""
    known: tuple[BaseException, Signature, re.Match[str]] | None = None
    for link, explicit in chain(exc):
        if isinstance(link, _NOT_OURS):
            return known
        if known is not None and not explicit:
            return known
        text, passed = _message(link), None
        for signature in SIGNATURES:
            match = signature.pattern.search(text) if isinstance(link, signature.types) else None
            if match is None:
                continue
            if signature.through is not None:
                passed = passed if passed is not None else frames_of(link, model)
                if not any(frame.in_torch(signature.through) for frame in passed):
                    continue
            known = link, signature, match
            break
    return known


def _module(found: Sequence[Frame], root: nn.Module | None) -> tuple[str | None, str | None]:
    """The qualified name and the type of the innermost module in the frames."""
    module = next((frame.module for frame in reversed(inner(found)) if frame.module is not None), None)
    if module is None:
        return None, None
    # In evaluation a copy of the model may fail.
    roots = [root, *(frame.module for frame in found)]
    names = (module_names(one).get(id(module)) for one in roots if one is not None)
    return next((name for name in names if name is not None), None), type(module).__name__
