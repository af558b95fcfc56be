"""Does an exported model still compute what the eager one does, and where does it stop?"""

from __future__ import annotations

import copy
import inspect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ampcheck.checker import FindingsError
from ampcheck.export.eager import Call, Observation, Read, Untracked, modules_run, observe, quiet_state, same, snapshot
from ampcheck.export.graph import POOLED, Exported
from ampcheck.export.program import Program
from ampcheck.export.torchscript import TorchScript, quiet
from ampcheck.export.values import (
    APART,
    Distance,
    Inputs,
    Tolerances,
    closest,
    described,
    distance,
    fresh,
    named_tensors,
    resized,
)
from ampcheck.precision import LOW_PRECISION
from ampcheck.report import Report
from ampcheck.selection import judge, reaching, selected, threshold
from ampcheck.trace import (
    BakedConstant,
    CapturedCasts,
    Cause,
    Comparison,
    ModuleError,
    OpaqueCall,
    OutputError,
    Site,
    Trace,
)
from ampcheck.walk import dtype_name, environment, unwrapped, walk

_DRAWS = 8
_FLOAT32 = 1e-3


def compare(
    eager: nn.Module,
    exported: object,
    inputs: object,
    *,
    fresh_inputs: Iterable[object] = (),
    dynamic_batch: bool | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    fail_on: str = "never",
) -> Report:
    """Run ``eager`` and its export on the same inputs, and say whether and in which module they part.

    ``exported`` is what ``torch.jit.trace``, ``torch.jit.script``, ``torch.export.export`` or
    ``torch.onnx.export(dynamo=True)`` returned, or the path of a file they saved (``.pt``, ``.pt2``, ``.onnx``).
    ``inputs`` is a tensor, a sequence of positional arguments or a mapping of keyword arguments. Both models also run
    on fresh inputs of the same shapes and ranges, on ``fresh_inputs`` where those are given, and on other sizes where
    the export claims to take them. A trace claims nothing: there, a size it stops at is a warning, unless
    ``dynamic_batch`` is true, and false leaves other sizes out.

    A tensor is equal where no value differs by more than ``atol`` and ``rtol`` times the tensor's largest value; the
    defaults go by dtype and are named in the report. Both run without gradients, in the mode (training or
    evaluation) and under the autocast setting they are found in; buffers and random state are put back.

    The comparison is ``report.comparison``. Raises ``ValueError`` with one sentence for inputs or files that cannot
    be compared, and ``FindingsError`` where a finding reaches ``fail_on``.
    """
    rules = [rule for rule in selected(select, ignore) if "comparison" in rule.needs]
    limit = threshold(fail_on)
    eager = unwrapped(eager)
    opened = opened_export(exported)
    opened.modules = frozenset(name for name, _ in eager.named_modules())
    opened.parameters = tuple(inspect.signature(eager.forward).parameters)
    example = Inputs.of(inputs)
    own = [Inputs.of(given, f"given inputs {index}") for index, given in enumerate(fresh_inputs, 1)]
    for given in (example, *own):
        _check(eager, opened, given)
    tolerances = Tolerances(opened.practice, rtol, atol)
    runs = _Runs(eager, opened, tolerances, seed)
    runs.add(example, required=True)
    for given in own:
        runs.add(given, required=True)
    for given in fresh(example, seed):
        runs.add(given)
    # A number read from an activation may decide a branch: look for inputs on which it decides otherwise.
    for extra in range(1, _DRAWS + 1):
        if not runs.undecided:
            break
        runs.add(fresh(example, seed + extra)[0])
    shapes = None if dynamic_batch is False else opened.resized_shapes(example)
    claimed = shapes is not None or dynamic_batch is True
    if shapes is None and dynamic_batch is not False and (opened.traced or dynamic_batch):
        shapes = _other_batch(example)
    if shapes is not None and shapes != [tuple(tensor.shape) for tensor in example.tensors]:
        runs.add(resized(example, shapes, f"other sizes, {_sizes(shapes)}", seed), other_sizes=True)
    comparison = _compared(eager, opened, runs, tolerances, claimed=claimed)
    trace = Trace(environment=environment(), model=walk(eager), comparison=comparison)
    report = Report(trace, *judge(trace, rules))
    reached = reaching(report.findings, limit)
    if reached:
        raise FindingsError(report, reached)
    return report


def opened_export(exported: object) -> Exported:
    """The exported model behind an object or a path. Raises ``ValueError``."""
    if isinstance(exported, torch.jit.ScriptModule):
        return TorchScript(exported)
    if isinstance(exported, ExportedProgram):
        return Program(exported)
    proto = getattr(exported, "model_proto", None)
    if proto is not None:
        return _onnx(None, proto)
    if not isinstance(exported, (str, os.PathLike)):
        raise ValueError(
            f"a {type(exported).__name__} is no exported model: give a TorchScript module, an ExportedProgram, an "
            "ONNXProgram or the path of a file"
        )
    path = Path(exported)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.suffix == ".onnx":
        return _onnx(path)
    try:
        with quiet():
            return Program(torch.export.load(path)) if path.suffix == ".pt2" else TorchScript(torch.jit.load(str(path)))
    except Exception as error:
        kind = "a torch.export program" if path.suffix == ".pt2" else "a TorchScript module"
        raise ValueError(f"{str(path)!r} cannot be read as {kind}: {_first_line(error)}") from error


def _onnx(path: Path | None, proto: Any = None) -> Exported:
    try:
        from ampcheck.export.onnx_file import OnnxModel

        return OnnxModel(path, proto)
    except ModuleNotFoundError as error:
        raise ValueError("onnxruntime is not installed, and without it an ONNX model cannot be run") from error


def _check(eager: nn.Module, exported: Exported, given: Inputs) -> None:
    """Inputs that neither model can be run on are told in one sentence. Raises ``ValueError``."""
    try:
        inspect.signature(eager.forward).bind(*given.args, **given.kwargs)
    except TypeError as error:
        raise ValueError(f"the eager model does not take these inputs: {error}") from error
    count, arity = len(given.args) + len(given.kwargs), exported.arity()
    if arity is not None and not arity[0] <= count <= arity[1] and len(given.tensors) != arity[1]:
        takes = f"{arity[0]}" if arity[0] == arity[1] else f"{arity[0]} to {arity[1]}"
        raise ValueError(f"the {exported.format} takes {takes} inputs, not {count}")
    exported.check(given)
    said = exported.declared()
    for declared, tensor in zip(said, given.tensors, strict=False) if len(said) == len(given.tensors) else ():
        if declared.dtype not in (None, tensor.dtype):
            wanted = dtype_name(declared.dtype) if declared.dtype else ""
            raise ValueError(
                f"input {declared.name!r} is {dtype_name(tensor.dtype)}, and the {exported.format} takes {wanted}"
            )
        if declared.shape is not None and not _fits(tensor, declared.shape):
            sizes = ", ".join("any" if size is None else str(size) for size in declared.shape)
            raise ValueError(
                f"input {declared.name!r} has the shape {list(tensor.shape)}, and the {exported.format} takes [{sizes}]"
            )
    devices = {tensor.device for tensor in given.tensors}
    for model, called in ((eager, "the eager model"), (exported.module, f"the {exported.format}")):
        held = {tensor.device for tensor in (*model.parameters(), *model.buffers())} if model is not None else set()
        if len(held) == 1 and len(devices) == 1 and held != devices:
            raise ValueError(f"the inputs are on {next(iter(devices))}, and {called} is on {next(iter(held))}")


def _fits(tensor: Tensor, shape: Sequence[int | None]) -> bool:
    return tensor.dim() == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )


@dataclass
class _Run:
    """Both models on one input."""

    seen: Observation
    distances: dict[str, Distance]
    error: str | None
    other_sizes: bool
    written: frozenset[str]

    @property
    def equal(self) -> bool:
        return self.error is None and all(found.equal for found in self.distances.values())

    @property
    def relative(self) -> float:
        return max((found.relative for found in self.distances.values()), default=0.0)


class _Runs:
    def __init__(self, eager: nn.Module, exported: Exported, tolerances: Tolerances, seed: int) -> None:
        self.eager, self.exported, self.tolerances, self.seed = eager, exported, tolerances, seed
        self.all: list[_Run] = []

    def add(self, given: Inputs, *, required: bool = False, other_sizes: bool = False) -> None:
        """Run both. Drawn inputs that the eager model refuses are dropped. Raises ``ValueError``."""
        try:
            seen = observe(self.eager, given, self.seed)
        except Exception as error:
            if not required:
                return
            raise ValueError(f"the eager model does not run on {given.name}: {_first_line(error)}") from error
        expected = named_tensors(seen.outputs)
        error_text, written = None, frozenset[str]()
        distances = dict.fromkeys(expected, APART)
        modules = [self.exported.module] if self.exported.module is not None else []
        try:
            with torch.no_grad(), quiet_state(self.seed, *modules) as changed:
                found = named_tensors(snapshot(self.exported.run(given.copied())))
                written = frozenset(changed())
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises is the finding
            _explain_dtype(self.exported, given, error)
            error_text = _first_line(error)
        else:
            if len(found) != len(expected) and not other_sizes:
                raise ValueError(
                    f"the eager model returns {len(expected)} tensors ({_listed(expected)}), and the "
                    f"{self.exported.format} {len(found)} ({_listed(found)})"
                )
            pairs = _paired(expected, found)
            distances.update({name: distance(expected[name], other, self.tolerances) for name, other in pairs})
        self.all.append(_Run(seen, distances, error_text, other_sizes, written))

    @property
    def example(self) -> _Run:
        return self.all[0]

    @property
    def same_sizes(self) -> list[_Run]:
        return [run for run in self.all if not run.other_sizes]

    @property
    def undecided(self) -> bool:
        """Whether every value read from an activation was the same on all inputs, and both models agree."""
        reads = [[read.value for read in run.seen.reads] for run in self.all]
        return bool(reads[0]) and all(values == reads[0] for values in reads) and not self.unequal

    @property
    def unequal(self) -> list[_Run]:
        return [run for run in self.all if not run.equal]


def _explain_dtype(exported: Exported, given: Inputs, error: Exception) -> None:
    module = exported.module
    held = {p.dtype for p in module.parameters() if p.is_floating_point()} if module is not None else set()
    inputs = {tensor.dtype for tensor in given.tensors if tensor.is_floating_point()}
    if len(held) == 1 and len(inputs) == 1 and held != inputs:
        raise ValueError(
            f"the inputs are {dtype_name(inputs.pop())}, and the {exported.format} computes in {dtype_name(held.pop())}"
        ) from error


def _paired(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    if set(expected) == set(found):
        return [(name, found[name]) for name in expected]
    return list(zip(expected, found.values(), strict=False))


def _listed(tensors: dict[str, Tensor]) -> str:
    return ", ".join(map(described, tensors.values()))


def _other_batch(example: Inputs) -> list[tuple[int, ...]] | None:
    """One more in the first dimension of every tensor that has the first tensor's size there."""
    shapes = [tuple(tensor.shape) for tensor in example.tensors]
    size = next((shape[0] for shape in shapes if shape), None)
    if size is None:
        return None
    return [(size + 1, *shape[1:]) if shape and shape[0] == size else shape for shape in shapes]


def _sizes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)


def _compared(
    eager: nn.Module, exported: Exported, runs: _Runs, tolerances: Tolerances, *, claimed: bool
) -> Comparison:
    causes: list[Cause] = []
    constants: list[BakedConstant] = []
    same_sizes_differ = any(not run.equal for run in runs.same_sizes)
    modules, unseen = _modules(exported, runs, tolerances)
    leaks = list(_changing(runs))
    constants += _baked(exported, leaks)
    causes += _training_mode(eager, exported)
    causes += _buffers(eager, exported, runs)
    causes += _other_state(eager, exported, tolerances, differs=same_sizes_differ)
    causes += _data_dependent(exported, runs)
    if same_sizes_differ and not constants:
        causes += [
            Cause("left-dispatcher", leak.module, described(leak.value), _sites(leak.site, leak.module))
            for leak in _once(leaks)
            if leak.foreign
        ]
    causes += _frozen_shape(runs, modules, unseen, claimed=claimed)
    causes += [Cause("raises", None, run.error, certain=True) for run in runs.same_sizes if run.error is not None][:1]
    return Comparison(
        first="eager",
        second=exported.format,
        outputs=tuple(_outputs(_decisive(runs, claimed=claimed))),
        tolerances=tuple(tolerances.used.values()),
        inputs=tuple(run.seen.inputs.name for run in runs.all),
        modules=modules,
        unseen=unseen,
        causes=tuple(causes),
        constants=tuple(constants),
        opaque=tuple(dict.fromkeys(exported.opaque_calls())),
        casts=tuple(_captured_casts(eager, exported, runs.example.seen)),
        rounding=_rounding(eager, exported, runs),
    )


def _decisive(runs: _Runs, *, claimed: bool) -> list[_Run]:
    """The runs the verdict rests on. That a trace stops at a size it does not claim to take is told by its cause."""
    if claimed:
        return runs.all
    differ = any(not run.equal for run in runs.same_sizes)
    return [run for run in runs.all if not run.other_sizes or (run.error is None and not differ)]


def _outputs(runs: Sequence[_Run]) -> Iterator[OutputError]:
    for name, tensor in named_tensors(runs[0].seen.outputs).items():
        worst = max(runs, key=lambda run: (not run.distances[name].equal, run.distances[name].relative))
        found = worst.distances[name]
        yield OutputError(
            name,
            dtype_name(tensor.dtype),
            tuple(tensor.shape),
            found.absolute,
            found.relative,
            found.equal,
            worst.seen.inputs.name,
        )


def _modules(exported: Exported, runs: _Runs, tolerances: Tolerances) -> tuple[tuple[ModuleError, ...], str | None]:
    """Both models module by module, on the inputs they differ most on."""
    ranked = sorted(runs.all, key=lambda run: (not run.equal, run.error is None, not run.other_sizes, run.relative))
    worst = ranked[-1] if runs.unequal else runs.all[-1 if len(runs.all) == 1 else 1]
    calls, unseen = exported.calls(worst.seen.inputs, runs.seed)
    return tuple(module_errors(worst.seen.calls, calls, tolerances)), unseen


def module_errors(first: Sequence[Call], second: Sequence[Call], tolerances: Tolerances) -> Iterator[ModuleError]:
    """The calls that were seen on both sides. An export may return more from a module than the module did, and in
    another order: an output agrees where any tensor of its shape does."""
    others: dict[tuple[str, int], Call] = {(call.module, call.index): call for call in second}
    for call in first:
        other = others.get((call.module, call.index)) or others.get((call.module, POOLED))
        if other is None:
            continue
        # What a module hands through beside its result may be missing from the graph.
        made = [tensor for tensor in call.outputs if not _among(tensor, call.inputs)] or call.outputs
        found = [closest(tensor, other.outputs, tolerances) for tensor in made]
        distances = [d for d in found if d is not None]
        if not distances and other.index != POOLED and other.outputs:
            distances = [APART]
        if not distances:
            continue
        worst = max(distances, key=lambda d: (not d.equal, d.relative))
        given = [closest(tensor, other.inputs, tolerances) for tensor in call.inputs]
        known = [d for d in given if d is not None]
        yield ModuleError(
            call.module,
            call.type,
            call.index,
            dtype_name(call.outputs[0].dtype),
            worst.absolute,
            worst.relative,
            all(d.equal for d in distances),
            all(d.equal for d in known) if known else None,
        )


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(same(tensor, other) for other in others)


def _changing(runs: _Runs) -> Iterator[Untracked]:
    """What no op computed from the inputs, and changes with them all the same."""
    example, *others = [run.seen for run in runs.same_sizes]
    for key, found in example.untracked.items():
        for other in others:
            now = other.untracked.get(key)
            if now is not None and (now.value.shape != found.value.shape or not same(now.value, found.value)):
                yield found
                break


def _once(leaks: Iterable[Untracked]) -> list[Untracked]:
    """One a line and module."""
    return list({(leak.key[0], leak.key[1], leak.module): leak for leak in reversed(list(leaks))}.values())[::-1]


def _baked(exported: Exported, leaks: Sequence[Untracked]) -> list[BakedConstant]:
    """The constants of the graph that are activations of the eager model."""
    constants = list(exported.constants())
    found = []
    for leak in leaks:
        value = leak.value
        for constant in constants:
            there = constant.site is not None and leak.site is not None
            at = there and (constant.site.file, constant.site.line) == (leak.site.file, leak.site.line)  # type: ignore[union-attr]
            if constant.value is None:
                matches = bool(at) and leak.foreign
            else:
                alike = constant.value.shape == value.shape and constant.value.dtype == value.dtype
                frozen = alike and same(constant.value.to(value.device), value)
                matches = alike and (frozen or (value.numel() > 1 and (bool(at) or constant.module == leak.module)))
            if matches:
                found.append((leak, constant))
                break
    kept = _once(leak for leak, _ in found)
    return [
        BakedConstant(
            leak.module,
            dtype_name(leak.value.dtype),
            tuple(leak.value.shape),
            _sited(leak.site, leak.module),
            leak.target,
        )
        for leak in kept
    ]


def _data_dependent(exported: Exported, runs: _Runs) -> Iterator[Cause]:
    """Python values read from activations, that were not always the same or are not known to be."""
    example, *others = runs.all
    first = example.seen.reads
    told: set[tuple[str, Site | None]] = set()
    differ = bool(runs.unequal)
    for run in others:
        for ours, theirs in zip(first, run.seen.reads, strict=False):
            if (ours.module, ours.site) != (theirs.module, theirs.site):
                break
            where = (ours.module, ours.site)
            if ours.value == theirs.value or where in told or not differ:
                continue
            told.add(where)
            yield Cause(
                "data-dependent", ours.module, _branch(ours, theirs, example, run), _sites(ours.site, ours.module)
            )
            break
    if not exported.traced:
        return
    for read in first:
        if (read.module, read.site) not in told:
            told.add((read.module, read.site))
            always = f"was {read.value!r} on every input tried"
            changed = any(read.value != r.value for run in others for r in run.seen.reads if r.site == read.site)
            detail = "changed with the inputs, without effect on what was compared" if changed else always
            yield Cause("data-dependent", read.module, detail, _sites(read.site, read.module), certain=False)


def _branch(ours: Read, theirs: Read, example: _Run, run: _Run) -> str:
    then, now = example.seen.ops[ours.position + 1 :], run.seen.ops[theirs.position + 1 :]
    what = "another branch was taken" if then != now else "the number was used"
    return (
        f"was {ours.value!r} on {example.seen.inputs.name} and {theirs.value!r} on {run.seen.inputs.name}, and {what}"
    )


def _training_mode(eager: nn.Module, exported: Exported) -> Iterator[Cause]:
    told: set[tuple[str, str]] = set()
    modules = dict(eager.named_modules())
    for op in exported.training_ops():
        if (op.op, op.module) not in told:
            told.add((op.op, op.module))
            mode = modules[op.module].training if op.module in modules else eager.training
            yield Cause("training-mode", op.module, op.op, _sites(op.site, op.module), certain=not mode)


def _buffers(eager: nn.Module, exported: Exported, runs: _Runs) -> Iterator[Cause]:
    """Buffers that a call of the exported model writes, and those that only the eager one does."""
    written = exported.written().union(*(run.written for run in runs.all))
    ours = frozenset[str]().union(*(run.seen.written for run in runs.all))
    differ = any(not run.equal for run in runs.same_sizes)
    if written:
        yield Cause("buffer-update", _owner(written), f"exported: {', '.join(sorted(written))}", certain=False)
    elif ours:
        yield Cause("buffer-update", _owner(set(ours)), f"eager: {', '.join(sorted(ours))}", certain=differ)


def _owner(names: set[str]) -> str:
    return sorted(names)[0].rpartition(".")[0]


def _other_state(eager: nn.Module, exported: Exported, tolerances: Tolerances, *, differs: bool) -> Iterator[Cause]:
    """Parameters and buffers that hold other values than the eager model's."""
    module = exported.module
    if module is None:
        return
    theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ours = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    names = [
        name
        for name, tensor in ours.items()
        if name in theirs and not distance(tensor.detach(), theirs[name].detach(), tolerances).equal
    ]
    if names:
        yield Cause("state-differs", _owner(set(names)), ", ".join(names), certain=differs)


def _frozen_shape(runs: _Runs, modules: Sequence[ModuleError], unseen: str | None, *, claimed: bool) -> Iterator[Cause]:
    """Other sizes alone make the difference, and no value read from an activation does."""
    if any(not run.equal for run in runs.same_sizes):
        return
    read = [value.value for value in runs.example.seen.reads]
    for run in runs.all:
        if run.other_sizes and not run.equal and [value.value for value in run.seen.reads] == read:
            how = f"it stops: {run.error}" if run.error is not None else "its outputs are others"
            stopped = unseen.partition("stopped in ")[2].partition(":")[0] if unseen else ""
            module = None if any(not module.equal for module in modules) else stopped or None
            yield Cause(
                "frozen-shape", module, f"on {run.seen.inputs.name} {how}", certain=claimed or run.error is None
            )


def _captured_casts(eager: nn.Module, exported: Exported, seen: Observation) -> Iterator[CapturedCasts]:
    own = {dtype_name(t.dtype) for t in (*eager.parameters(), *eager.buffers(), *seen.inputs.tensors)}
    counts: Counter[tuple[str, str]] = Counter()
    sites: dict[tuple[str, str], Site | None] = {}
    for cast in exported.casts():
        counts[cast.module, cast.dtype] += 1
        sites.setdefault((cast.module, cast.dtype), cast.site)
    for (module, dtype), number in counts.items():
        extra = number - seen.casts[module, dtype]
        if extra > 0 and dtype not in own:
            yield CapturedCasts(dtype, module, extra, _sited(sites[module, dtype], module))


def _rounding(eager: nn.Module, exported: Exported, runs: _Runs) -> tuple[float, float] | None:
    """Where a low-precision export differs from a low-precision eager model by rounding alone: the relative errors of
    both against the eager model in float32.

    It is rounding where the export, too, is right in float32, or where that cannot be tried, where its error is of the
    size of the eager model's.
    """
    unequal = [run for run in runs.same_sizes if not run.equal and run.error is None]
    low = {dtype_name(p.dtype) for p in eager.parameters()} & LOW_PRECISION
    if not unequal or not low:
        return None
    run = max(unequal, key=lambda r: r.relative)
    wide = run.seen.inputs.map(lambda _, t: t.float() if dtype_name(t.dtype) in LOW_PRECISION else t, "float32")
    twin = exported.in_float32()
    try:
        expected = named_tensors(modules_run(copy.deepcopy(eager).float(), wide, runs.seed).outputs)
        ours = _relative(expected, named_tensors(run.seen.outputs), runs)
        theirs = _relative(expected, _outputs_of(exported, run.seen.inputs, runs), runs)
        exact = _relative(expected, _outputs_of(twin, wide, runs), runs) if twin is not None else None
    except Exception:  # noqa: BLE001 - a model that cannot run in float32 is not judged by it
        return None
    rounds = exact <= _FLOAT32 if exact is not None else theirs <= max(4 * ours, _FLOAT32)
    return (ours, theirs) if rounds else None


def _outputs_of(exported: Exported, given: Inputs, runs: _Runs) -> dict[str, Tensor]:
    with torch.no_grad(), quiet_state(runs.seed, *([exported.module] if exported.module is not None else [])):
        return named_tensors(snapshot(exported.run(given.copied())))


def _relative(expected: dict[str, Tensor], found: dict[str, Tensor], runs: _Runs) -> float:
    return max(distance(expected[name], other, runs.tolerances).relative for name, other in _paired(expected, found))


def _sited(site: Site | None, module: str) -> Site | None:
    if site is None:
        return None
    return Site(site.file, site.line, site.function, site.code, site.role, module or None)


def _sites(site: Site | None, module: str) -> tuple[Site, ...]:
    found = _sited(site, module)
    return (found,) if found else ()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error: " in line]
    return (told[-1] if told else lines[0]).rstrip(".") if lines else type(error).__name__


__all__ = ["OpaqueCall", "compare", "opened_export"]
