"""Trains a model twice from the same seed, without and with AmpCheck, and compares the two."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

import ampcheck

from .recipe import STEPS, Precision, Recipe, Training


class Result(NamedTuple):
    """The outcome of a training: the losses, and a digest of model, optimizer, scaler and random state."""

    losses: tuple[float, ...]
    digest: str


def tried(recipe: Recipe, dtype: str) -> dict[str, Any]:
    """The run of one model in one precision, as JSON. ``outcome`` is ``healthy``; ``fails alone`` without AmpCheck; or,
    with it, ``differs``, ``raises`` or ``not watched``. If two plain runs differ, the watched one proves nothing, and
    ``repeatable`` is false."""
    start = time.perf_counter()
    run: dict[str, Any] = {"dtype": dtype, "outcome": "healthy", "findings": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plain = _trained(recipe, dtype)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the model's own
            return run | {"outcome": "fails alone", "error": _told(error)}
        if not all(map(math.isfinite, plain.losses)):
            return run | {"outcome": "fails alone", "error": f"the losses are {plain.losses}"}
        watches: list[ampcheck.watch] = []
        try:
            watched = _trained(recipe, dtype, watches)
        except Exception as error:  # noqa: BLE001
            run |= {"outcome": "raises", "error": _told(error)}
        else:
            run |= _compared(recipe, dtype, plain, watched)
    report = watches[0].report if watches else None
    if report is not None:
        seen = report.to_dict()
        run["findings"] = [{k: f[k] for k in ("code", "severity", "message", "module")} for f in seen["findings"]]
        unseen = {entry["reason"] for entry in seen["not_judged"]}
        run["not_judged"] = sorted(unseen)
        training, evaluation = report.trace.training, report.trace.evaluation
        if run["outcome"] == "healthy" and (training is None or evaluation is None):
            run["outcome"] = "not watched"
    return run | {"seconds": round(time.perf_counter() - start, 2)}


def _compared(recipe: Recipe, dtype: str, plain: Result, watched: Result) -> dict[str, Any]:
    if plain == watched:
        return {"repeatable": True}
    if _trained(recipe, dtype) != plain:
        return {"repeatable": False}
    what = "the losses" if plain.losses != watched.losses else "model, optimizer, scaler or random state"
    return {"outcome": "differs", "error": f"{what}: {plain} without, {watched} with AmpCheck"}


def _trained(recipe: Recipe, dtype: str, watches: list[ampcheck.watch] | None = None) -> Result:
    torch.manual_seed(0)
    training, precision = recipe.build(), Precision(dtype)
    torch.manual_seed(1)
    losses = []
    guard: AbstractContextManager[object] = nullcontext()
    if watches is not None:
        guard = ampcheck.watch(
            training.model, optimizer=training.optimizers, scaler=precision.scaler, report=False, emit=lambda text: None
        )
        watches.append(guard)
    with guard:
        training.model.train()
        for _ in range(STEPS):
            losses.append(training.step(precision))
        training.model.eval()
        training.evaluate(precision)
    state = hashlib.blake2b()
    for part in _state(training, precision):
        state.update(part)
    return Result(tuple(float(loss) for loss in losses), state.hexdigest())


def _state(training: Training, precision: Precision) -> Iterator[bytes]:
    scaler = precision.scaler.state_dict() if precision.scaler is not None else None
    optimizers = [optimizer.state_dict() for optimizer in training.optimizers]
    yield from _bytes([_tensors(training.model), optimizers, scaler, torch.get_rng_state()])


def _tensors(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _bytes(value: Any) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield dense.contiguous().reshape(-1).view(torch.uint8).numpy().data if value.numel() else b""
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _bytes(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _bytes(item)
    else:
        yield repr(value).encode()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
