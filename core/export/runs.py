"""Run the eager model and its export on the same inputs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ampcheck.export.eager import (
    Call,
    Observation,
    eager_outputs,
    modules_run,
    observe,
    outputs_rounded_otherwise,
    quiet_state,
    same,
    snapshot,
)
from ampcheck.export.graph import POOLED, Exported, inside
from ampcheck.export.opened import check_dtype, first_line
from ampcheck.export.values import (
    APART,
    Distance,
    Inputs,
    Tolerances,
    closest,
    described,
    distance,
    named_tensors,
)
from ampcheck.observe.walk import dtype_name
from ampcheck.trace import ModuleError, OutputError

_AS_MUCH = 0.1
Choose = Callable[[Any], Any]


@dataclass
class Run:
    """Both models on one input.

    ``outputs`` are the eager model's outputs that are compared, ``error`` is what the exported model raised,
    ``written`` names the buffers that its run changed. ``unsettled`` is the largest difference that is not the export's
    fault: changes as small as rounding change what the eager model returns as much.
    """

    seen: Observation
    outputs: dict[str, Tensor]
    distances: dict[str, Distance]
    error: str | None
    other_sizes: bool
    written: frozenset[str]
    unsettled: Distance | None = None

    @property
    def equal(self) -> bool:
        return self.error is None and all(found.equal for found in self.distances.values())

    @property
    def relative(self) -> float:
        return max((found.relative for found in self.distances.values()), default=0.0)


class Runs:
    """The runs of both models, the example first."""

    def __init__(
        self,
        eager: nn.Module,
        exported: Exported,
        tolerances: Tolerances,
        seed: int,
        choose: Choose | None,
        seconds: float = math.inf,
    ) -> None:
        self.eager, self.exported, self.tolerances, self.seed = eager, exported, tolerances, seed
        self._choose = choose
        self._until = time.monotonic() + seconds
        self.all: list[Run] = []

    @property
    def late(self) -> bool:
        """Whether the time for trying inputs is over."""
        return time.monotonic() > self._until

    def add(self, given: Inputs, *, required: bool = False, other_sizes: bool = False) -> bool:
        """Run both models; return false if the eager model refuses inputs that are not ``required``.

        Raises ``ValueError``.
        """
        try:
            seen = observe(self.eager, given, self.seed)
        except Exception as error:
            if not required:
                return False
            raise ValueError(f"the eager model does not run on {given.name}: {first_line(error)}") from error
        expected = self._chosen(seen.outputs)
        error_text, written, others = None, frozenset[str](), dict[str, Tensor]()
        distances = dict.fromkeys(expected, APART)
        modules = [self.exported.module] if self.exported.module is not None else []
        try:
            with torch.no_grad(), quiet_state(self.seed, *modules) as changed:
                found = named_tensors(snapshot(self.exported.run(given.copied())))
                written = frozenset(changed())
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises is the finding
            check_dtype(self.exported, given, error)
            error_text = first_line(error)
        else:
            if len(found) != len(expected) and not other_sizes:
                raise ValueError(self._mismatch(expected, found))
            others = dict(_paired(expected, found))
            distances.update((name, distance(expected[name], other, self.tolerances)) for name, other in others.items())
        run = Run(seen, expected, distances, error_text, other_sizes, written)
        if run.error is None and not run.equal:
            self._settle(run, others)
        self.all.append(run)
        return True

    def _settle(self, run: Run, others: dict[str, Tensor]) -> None:
        """Excuse differences to which no export can be held: tied scores, for example, leave a sort in any order."""
        try:
            again = self._chosen(outputs_rounded_otherwise(self.eager, run.seen.inputs, self.seed))
        except Exception:  # noqa: BLE001 - then nothing is known about it
            return
        for name, found in run.distances.items():
            other = others.get(name)
            if not found.equal and other is not None and self._as_unsettled(run.outputs[name], other, again.get(name)):
                run.distances[name] = Distance(found.absolute, found.relative, True)
                run.unsettled = max(run.unsettled or found, found, key=lambda apart: apart.relative)

    def _as_unsettled(self, eager: Tensor, other: Tensor, again: Tensor | None) -> bool:
        """Whether ``again``, the eager model's output if it rounds otherwise, is as far from ``eager`` as ``other`` is.

        Compares value by value, and with the values sorted along every axis and as a whole: another order does not
        excuse other values.
        """
        if again is None:
            return True

        def as_far(ordered: int | None, *tensors: Tensor) -> bool:
            found, own = (distance(tensors[0], t, self.tolerances, ordered=ordered) for t in tensors[1:])
            return found.equal or (not own.equal and own.absolute >= _AS_MUCH * found.absolute)

        given = (eager, other, again)
        return all(as_far(axis, *given) for axis in (None, *range(eager.dim()))) and as_far(
            0, *(tensor.reshape(-1) for tensor in given)
        )

    def _chosen(self, outputs: object) -> dict[str, Tensor]:
        """The outputs of the eager model that the export returns too."""
        if self._choose is None:
            return named_tensors(outputs)
        try:
            found = named_tensors(self._choose(outputs))
        except Exception as error:
            raise ValueError(f"`outputs` fails on what the eager model returns: {first_line(error)}") from error
        if not found:
            raise ValueError("`outputs` returns no tensor of the eager model's outputs")
        return found

    def _mismatch(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
        text = (
            f"the eager model returns {len(expected)} tensors ({_listed(expected)}), and the {self.exported.format} "
            f"{len(found)} ({_listed(found)})"
        )
        fewer = len(found) < len(expected) and self._choose is None
        return (
            f"{text}; use the option `outputs` (`lambda y: y[0]`, say) to select what was exported" if fewer else text
        )

    @property
    def example(self) -> Run:
        return self.all[0]

    @property
    def same_sizes(self) -> list[Run]:
        return [run for run in self.all if not run.other_sizes]

    @property
    def undecided(self) -> bool:
        """Whether every value read from an activation was the same on all inputs, and both models agree."""
        reads = [[read.value for read in run.seen.reads] for run in self.all]
        return bool(reads[0]) and all(values == reads[0] for values in reads) and not self.unequal

    @property
    def unequal(self) -> list[Run]:
        return [run for run in self.all if not run.equal]

    def outputs(self, decisive: Sequence[Run]) -> Iterator[OutputError]:
        """Every output, on the ``decisive`` run on which it differs most."""
        for name, tensor in decisive[0].outputs.items():
            worst = max(decisive, key=lambda run: (not run.distances[name].equal, run.distances[name].relative))
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

    def modules(self) -> tuple[tuple[ModuleError, ...], str | None]:
        """Both models module by module, on the inputs on which they differ most, and why that is incomplete."""
        ranked = sorted(self.all, key=lambda run: (not run.equal, run.error is None, not run.other_sizes, run.relative))
        settled = [run for run in self.all if run.unsettled is None] or self.all
        worst = ranked[-1] if self.unequal else settled[:2][-1]
        calls, unseen = self.exported.calls(worst.seen.inputs, self.seed)
        errors = list(module_errors(modules_run(self.eager, worst.seen.inputs, self.seed)[1], calls, self.tolerances))
        return tuple(_that_matter(errors)), unseen

    def relative_errors(self, reference: nn.Module, wide: Inputs, run: Run) -> tuple[float, float, float | None]:
        """How far outputs are from those of ``reference`` on ``wide``.

        They are the eager outputs of ``run``, those of the exported model, and those of its float32 twin (``None``: it
        has none).
        """
        expected = self._chosen(eager_outputs(reference, wide, self.seed))
        twin = self.exported.in_float32()
        return (
            self._relative(expected, run.outputs),
            self._relative(expected, self._outputs_of(self.exported, run.seen.inputs)),
            self._relative(expected, self._outputs_of(twin, wide)) if twin is not None else None,
        )

    def _outputs_of(self, exported: Exported, given: Inputs) -> dict[str, Tensor]:
        with torch.no_grad(), quiet_state(self.seed, *([exported.module] if exported.module is not None else [])):
            return named_tensors(snapshot(exported.run(given.copied())))

    def _relative(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
        pairs = _paired(expected, found)
        return max(distance(expected[name], other, self.tolerances).relative for name, other in pairs)


def _paired(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    if set(expected) == set(found):
        return [(name, found[name]) for name in expected]
    return list(zip(expected, found.values(), strict=False))


def _listed(tensors: dict[str, Tensor]) -> str:
    return ", ".join(map(described, tensors.values()))


def module_errors(first: Sequence[Call], second: Sequence[Call], tolerances: Tolerances) -> Iterator[ModuleError]:
    """Yield the errors of the calls seen on both sides.

    An export may return more from a module than the module did, and in another order: an output agrees if it agrees
    with any tensor of its shape.
    """
    others: dict[tuple[str, int], Call] = {(call.module, call.index): call for call in second}
    ours = Counter((call.module, tensor.shape) for call in first for tensor in _made(call))
    theirs = Counter((call.module, tensor.shape) for call in second for tensor in call.outputs)
    for call in first:
        other = others.get((call.module, call.index)) or others.get((call.module, POOLED))
        if other is None:
            continue
        made = _made(call)
        # It is unknown which of the calls a flat graph left out.
        if other.index == POOLED and any(theirs[call.module, t.shape] < ours[call.module, t.shape] for t in made):
            continue
        taken = max(
            (float(t.abs().nan_to_num(0, 0, 0).max()) for t in call.inputs if t.is_floating_point() and t.numel()),
            default=0.0,
        )
        found = [closest(tensor, other.outputs, tolerances, taken) for tensor in made]
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


def _made(call: Call) -> list[Tensor]:
    """The outputs that a call made. Tensors that a module only passes through may be missing from the graph."""
    return [tensor for tensor in call.outputs if not _among(tensor, call.inputs)] or call.outputs


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(same(tensor, other) for other in others)


def _that_matter(errors: Sequence[ModuleError]) -> Iterator[ModuleError]:
    """Leave out the calls that differ inside one whose output agrees.

    An export may fold a normalization into the convolution before it, and then the convolution alone differs.
    """
    for index, error in enumerate(errors):
        around: dict[str, ModuleError] = {}
        for later in errors[index + 1 :] if not error.equal else ():
            if later.module != error.module and inside(error.module, later.module):
                around.setdefault(later.module, later)
        if not any(later.equal for later in around.values()):
            yield error
