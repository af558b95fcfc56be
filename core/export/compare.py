"""Check whether an exported model still computes what the eager one does, and where it stops doing so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from ampcheck.checker import FindingsError
from ampcheck.export.causes import baked_constants, captured_casts, changing_untracked, find_causes, rounding
from ampcheck.export.opened import check_inputs, opened_export
from ampcheck.export.runs import Choose, Run, Runs
from ampcheck.export.values import Inputs, Tolerances, fresh, resized
from ampcheck.observe.walk import environment, unwrapped, walk
from ampcheck.report import Report
from ampcheck.rules.judging import judge, reaching, selected, threshold
from ampcheck.trace import Comparison, Trace

_DRAWS = 8


def compare(
    eager: nn.Module,
    exported: object,
    inputs: object,
    *,
    fresh_inputs: Iterable[object] = (),
    outputs: Choose | None = None,
    dynamic_batch: bool | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    fail_on: str = "never",
    trusted: bool = False,
) -> Report:
    """Run ``eager`` and its export on the same inputs, and report whether they differ and in which module.

    ``exported`` is what ``torch.jit.trace``, ``torch.jit.script``, ``torch.export.export`` or
    ``torch.onnx.export(dynamo=True)`` returned, or the path of a file saved by them (``.pt``, ``.pt2``, ``.onnx``).
    ``inputs`` is a tensor, a sequence of positional arguments or a mapping of keyword arguments. Both models also run
    on fresh inputs of the same shapes and ranges, on ``fresh_inputs`` if given, and on other sizes if the export claims
    to take them. A trace claims nothing: a size at which it stops is a warning, unless ``dynamic_batch`` is true. If
    ``dynamic_batch`` is false, other sizes are left out.

    ``outputs`` takes what the eager model returns and gives the part that was exported, if that is not all of it:
    ``lambda y: y["logits"]``.

    A tensor is equal if no value differs by more than ``atol`` plus ``rtol`` times the largest value of the tensor, and
    of each of its rows and channels; the defaults depend on the dtype and are named in the report. Both models run
    without gradients, in the mode (training or evaluation) and under the autocast setting they are found in; buffers
    and random state are put back.

    A ``.pt2`` file can run code when PyTorch loads it, and is loaded only if it is ``trusted``.

    The comparison is ``report.comparison``. Raises ``ValueError`` with one sentence for inputs or files that cannot be
    compared, and ``FindingsError`` if a finding reaches ``fail_on``.
    """
    rules = [rule for rule in selected(select, ignore) if "comparison" in rule.needs]
    limit = threshold(fail_on)
    comparison = compared(
        eager, exported, inputs, fresh_inputs=fresh_inputs, outputs=outputs, dynamic_batch=dynamic_batch,
        rtol=rtol, atol=atol, seed=seed, trusted=trusted,
    )  # fmt: skip
    eager = unwrapped(eager)
    trace = Trace(environment=environment(), model=walk(eager), comparison=comparison)
    report = Report(trace, *judge(trace, rules))
    reached = reaching(report.findings, limit)
    if reached:
        raise FindingsError(report, reached)
    return report


def compared(
    eager: nn.Module,
    exported: object,
    inputs: object,
    *,
    fresh_inputs: Iterable[object] = (),
    outputs: Choose | None = None,
    dynamic_batch: bool | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    trusted: bool = False,
    seconds: float = math.inf,
) -> Comparison:
    """What ``compare`` judges. No further inputs are tried after ``seconds``. Raises ``ValueError``."""
    eager = unwrapped(eager)
    opened = opened_export(exported, eager, trusted=trusted)
    example = Inputs.of(inputs)
    own = [Inputs.of(given, f"given inputs {index}") for index, given in enumerate(fresh_inputs, 1)]
    for given in (example, *own):
        check_inputs(eager, opened, given)
    tolerances = Tolerances(opened.practice, rtol, atol)
    runs = Runs(eager, opened, tolerances, seed, outputs, seconds)
    runs.add(example, required=True)
    for given in own:
        runs.add(given, required=True)
    for given in fresh(example, seed):
        if not runs.late:
            runs.add(given)
    # A number read from an activation may decide a branch: look for inputs on which it decides otherwise.
    for extra in range(1, _DRAWS + 1):
        if runs.late or not runs.undecided:
            break
        runs.add(fresh(example, seed + extra)[0])
    claimed = dynamic_batch is not False and (opened.resized_shapes(example) is not None or dynamic_batch is True)
    if not runs.late and (claimed or (opened.traced and dynamic_batch is None)):
        _add_other_sizes(runs, example)
    left_out = f"no further inputs were tried after {seconds:g} s" if runs.late else None
    return replace(_compared(runs, claimed=claimed), left_out=left_out)


def _add_other_sizes(runs: Runs, example: Inputs) -> None:
    """Run on other sizes: one more or, if the eager model refuses that, twice as many.

    A model that halves its images refuses one pixel more, and takes twice as many.
    """
    for double in (False, True):
        shapes = runs.exported.resized_shapes(example, double=double) or _other_batch(example)
        if shapes is None or shapes == [tuple(tensor.shape) for tensor in example.tensors]:
            return
        if runs.add(resized(example, shapes, f"other sizes, {_sizes(shapes)}", runs.seed), other_sizes=True):
            return


def _other_batch(example: Inputs) -> list[tuple[int, ...]] | None:
    """The shapes with one more in the first dimension of every tensor that has the first tensor's size there."""
    shapes = [tuple(tensor.shape) for tensor in example.tensors]
    size = next((shape[0] for shape in shapes if shape), None)
    if size is None:
        return None
    return [(size + 1, *shape[1:]) if shape and shape[0] == size else shape for shape in shapes]


def _sizes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)


def _compared(runs: Runs, *, claimed: bool) -> Comparison:
    exported = runs.exported
    modules, unseen = runs.modules()
    leaks = changing_untracked(runs)
    constants = baked_constants(runs, leaks)
    return Comparison(
        first="eager",
        second=exported.format,
        outputs=tuple(runs.outputs(_decisive(runs, claimed=claimed))),
        tolerances=tuple(runs.tolerances.used.values()),
        inputs=tuple(run.seen.inputs.name for run in runs.all),
        modules=modules,
        unseen=unseen,
        causes=tuple(find_causes(runs, leaks, constants, modules, unseen, claimed=claimed)),
        constants=constants,
        opaque=tuple(dict.fromkeys(exported.opaque_calls())),
        casts=tuple(captured_casts(runs)),
        rounding=rounding(runs),
    )


def _decisive(runs: Runs, *, claimed: bool) -> list[Run]:
    """The runs the verdict rests on. If a trace stops at a size it does not claim to take, its cause says so."""
    if claimed:
        return runs.all
    differ = any(not run.equal for run in runs.same_sizes)
    return [run for run in runs.all if not run.other_sizes or (run.error is None and not differ)]
