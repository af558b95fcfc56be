"""Why an export differs, or will, as far as its graph and the runs of both models show it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ampcheck.export.eager import Read, Untracked, same
from ampcheck.export.graph import Constant
from ampcheck.export.runs import Run, Runs
from ampcheck.export.values import described, distance
from ampcheck.observe.walk import dtype_name
from ampcheck.precision import LOW_PRECISION
from ampcheck.trace import BakedConstant, CapturedCasts, Cause, ModuleError, Site

_FLOAT32 = 1e-3


def changing_untracked(runs: Runs) -> list[Untracked]:
    """The tensors that no op computed from the inputs, and that change with the inputs all the same."""
    example, *others = [run.seen for run in runs.same_sizes]
    return [
        found
        for key, found in example.untracked.items()
        if any(key in other.untracked and not same(other.untracked[key].value, found.value) for other in others)
    ]


def baked_constants(runs: Runs, leaks: Sequence[Untracked]) -> tuple[BakedConstant, ...]:
    """The constants of the graph that are activations of the eager model.

    An export may have folded them into others, or hold the blank tensor that a kernel filled. If it differs, and no
    Python call stands for the code that made such an activation, its value is fixed all the same.
    """
    constants = list(runs.exported.constants())
    baked = [leak for leak in leaks if any(_holds(constant, leak) for constant in constants)]
    if not baked and any(not run.equal for run in runs.same_sizes):
        called = {call.module for call in runs.exported.opaque_calls()}
        baked = [leak for leak in leaks if leak.foreign and leak.module not in called]
    return tuple(
        BakedConstant(
            leak.module,
            dtype_name(leak.value.dtype),
            tuple(leak.value.shape),
            _sited(leak.site, leak.module),
            leak.target,
        )
        for leak in _once(baked)
    )


def _holds(constant: Constant, leak: Untracked) -> bool:
    """Whether a constant is ``leak`` on the example, or on the example that the export was made with."""
    value = leak.value
    at = (
        constant.site is not None
        and leak.site is not None
        and (constant.site.file, constant.site.line) == (leak.site.file, leak.site.line)
    )
    if constant.value is None:
        return at and leak.foreign
    if constant.value.shape != value.shape or constant.value.dtype != value.dtype:
        return False
    return same(constant.value.to(value.device), value) or (
        value.numel() > 1 and (at or constant.module == leak.module)
    )


def _once(leaks: Iterable[Untracked]) -> list[Untracked]:
    """One leak per line and module."""
    return list({(leak.key[0], leak.key[1], leak.module): leak for leak in reversed(list(leaks))}.values())[::-1]


def find_causes(
    runs: Runs,
    leaks: Sequence[Untracked],
    constants: Sequence[BakedConstant],
    modules: Sequence[ModuleError],
    unseen: str | None,
    *,
    claimed: bool,
) -> Iterator[Cause]:
    """Yield all causes that can be shown, in report order. ``claimed``: the export claims to take other sizes."""
    differ = any(not run.equal for run in runs.same_sizes)
    yield from _training_mode(runs)
    yield from _buffers(runs)
    if differ:
        yield from _other_state(runs, modules)
    yield from _data_dependent(runs)
    if differ and not constants:
        for leak in _once(leak for leak in leaks if leak.foreign):
            yield Cause("left-dispatcher", leak.module, described(leak.value), _sites(leak.site, leak.module))
    if not differ:
        yield from _frozen_shape(runs, modules, unseen, claimed=claimed)
    unsettled = [run for run in runs.all if run.unsettled is not None]
    if unsettled:
        apart = max(run.unsettled.relative for run in unsettled if run.unsettled is not None)
        names = ", ".join(run.seen.inputs.name for run in unsettled)
        yield Cause("unsettled", None, f"{apart:.2g} on {names}", certain=False)
    for run in [run for run in runs.same_sizes if run.error is not None][:1]:
        yield Cause("raises", None, run.error or "", certain=True)


def _data_dependent(runs: Runs) -> Iterator[Cause]:
    """Python values read from activations that varied, or that are not known to be constant."""
    example, *others = runs.all
    first = example.seen.reads
    told: set[tuple[str, Site | None]] = set()
    differ = not all(map(_agrees, runs.all))
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
    if not runs.exported.traced:
        return
    for read in first:
        if (read.module, read.site) not in told:
            told.add((read.module, read.site))
            always = f"was {read.value!r} on every input tried"
            changed = [r for r in others if any(o.site == read.site and o.value != read.value for o in r.seen.reads)]
            detail = "changed with the inputs" if changed else always
            if changed and all(map(_agrees, changed)):
                detail += ", without effect on what was compared"
            yield Cause("data-dependent", read.module, detail, _sites(read.site, read.module), certain=False)


def _agrees(run: Run) -> bool:
    """Whether both models return the same, and rounding leaves no doubt about it."""
    return run.equal and run.unsettled is None


def _branch(ours: Read, theirs: Read, example: Run, run: Run) -> str:
    then, now = example.seen.ops[ours.position + 1 :], run.seen.ops[theirs.position + 1 :]
    what = "another branch was taken" if then != now else "the number was used"
    return (
        f"was {ours.value!r} on {example.seen.inputs.name} and {theirs.value!r} on {run.seen.inputs.name}, and {what}"
    )


def _training_mode(runs: Runs) -> Iterator[Cause]:
    found: dict[tuple[str, bool], dict[str, Site | None]] = {}
    modules = dict(runs.eager.named_modules())
    for op in runs.exported.training_ops():
        mode = modules[op.module].training if op.module in modules else runs.eager.training
        found.setdefault((op.op, not mode), {}).setdefault(op.module, op.site)
    for (kind, certain), places in found.items():
        first, *others = places
        detail = ": ".join([kind, ", ".join(others)]) if others else kind
        yield Cause("training-mode", first, detail, _sites(places[first], first), certain=certain)


def _buffers(runs: Runs) -> Iterator[Cause]:
    """Buffers that a call of the exported model writes, or else those that only the eager model writes."""
    written = runs.exported.written().union(*(run.written for run in runs.all))
    ours = frozenset[str]().union(*(run.seen.written for run in runs.all))
    differ = any(not run.equal for run in runs.same_sizes)
    if written:
        yield Cause("buffer-update", _owner(written), f"exported: {', '.join(sorted(written))}", certain=False)
    elif ours:
        yield Cause("buffer-update", _owner(set(ours)), f"eager: {', '.join(sorted(ours))}", certain=differ)


def _owner(names: set[str]) -> str:
    return sorted(names)[0].rpartition(".")[0]


def _other_state(runs: Runs, modules: Sequence[ModuleError]) -> Iterator[Cause]:
    """Parameters and buffers with other values than the eager model's, if a module that owns one differs."""
    exported = runs.exported.module
    if exported is None:
        return
    theirs = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
    ours = {**dict(runs.eager.named_parameters()), **dict(runs.eager.named_buffers())}
    names = [
        name
        for name, tensor in ours.items()
        if name in theirs and not distance(tensor.detach(), theirs[name].detach(), runs.tolerances).equal
    ]
    begin = {module.module for module in modules if not module.equal and module.inputs_equal is not False}
    if any(not modules or name.rpartition(".")[0] in begin for name in names):
        yield Cause("state-differs", _owner(set(names)), ", ".join(names))


def _frozen_shape(runs: Runs, modules: Sequence[ModuleError], unseen: str | None, *, claimed: bool) -> Iterator[Cause]:
    """Runs in which other sizes alone make the difference, and no value read from an activation does."""
    read = [value.value for value in runs.example.seen.reads]
    for run in runs.all:
        if run.other_sizes and not run.equal and [value.value for value in run.seen.reads] == read:
            how = f"it stops: {run.error}" if run.error is not None else "its outputs differ"
            stopped = unseen.partition("stopped in ")[2].partition(":")[0] if unseen else ""
            module = None if any(not module.equal for module in modules) else stopped or None
            yield Cause(
                "frozen-shape", module, f"on {run.seen.inputs.name} {how}", certain=claimed or run.error is None
            )


def captured_casts(runs: Runs) -> Iterator[CapturedCasts]:
    """Yield the casts to low precision that the graph makes and the eager model, on the example, does not."""
    eager, seen = runs.eager, runs.example.seen
    own = {dtype_name(t.dtype) for t in (*eager.parameters(), *eager.buffers(), *seen.inputs.tensors)}
    counts: Counter[tuple[str, str]] = Counter()
    sites: dict[tuple[str, str], Site | None] = {}
    for cast in runs.exported.casts():
        counts[cast.module, cast.dtype] += 1
        sites.setdefault((cast.module, cast.dtype), cast.site)
    for (module, dtype), number in counts.items():
        extra = number - seen.casts[module, dtype]
        if extra > 0 and dtype not in own:
            yield CapturedCasts(dtype, module, extra, _sited(sites[module, dtype], module))


def rounding(runs: Runs) -> tuple[float, float] | None:
    """The relative errors of the eager model and its export in low precision, if they differ by rounding alone.

    Both errors are relative to the eager model in float32. It is rounding if the export is right in float32 too or, if
    that cannot be tried, if its error is about as large as the eager model's.
    """
    unequal = [run for run in runs.same_sizes if not run.equal and run.error is None]
    low = {dtype_name(p.dtype) for p in runs.eager.parameters()} & LOW_PRECISION
    if not unequal or not low:
        return None
    run = max(unequal, key=lambda r: r.relative)
    wide = run.seen.inputs.map(lambda _, t: t.float() if dtype_name(t.dtype) in LOW_PRECISION else t, "float32")
    try:
        ours, theirs, exact = runs.relative_errors(copy.deepcopy(runs.eager).float(), wide, run)
    except Exception:  # noqa: BLE001 - a model that cannot run in float32 is not judged by it
        return None
    rounds = exact <= _FLOAT32 if exact is not None else theirs <= max(4 * ours, _FLOAT32)
    return (ours, theirs) if rounds else None


def _sited(site: Site | None, module: str) -> Site | None:
    if site is None:
        return None
    return Site(site.file, site.line, site.function, site.code, site.role, module or None)


def _sites(site: Site | None, module: str) -> tuple[Site, ...]:
    found = _sited(site, module)
    return (found,) if found else ()
