"""The checker that adapters wrap: attach at fit start, watch a step, diagnose a failure, detach."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from ampcheck.failure import examine
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import bare, hide_frames
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.replay import replay
from ampcheck.observe.rerun import of_frame, of_traceback
from ampcheck.observe.step import WatchedStep, merged
from ampcheck.observe.walk import (
    anything_compiled,
    environment,
    examine_optimizer,
    examine_scaler,
    is_compiled,
    precision_by_policy,
    unwrapped,
    walk,
)
from ampcheck.precision import Precision
from ampcheck.report import Report
from ampcheck.report.ranks import gather, merged_findings, rank
from ampcheck.report.text import NAME, fit_line, not_judged_line, render_finding, step_line
from ampcheck.rules.internal_error import internal_error
from ampcheck.rules.judging import judge, reaching, selected, threshold
from ampcheck.rules.rule import Finding, Severity, told
from ampcheck.source.printable import shown
from ampcheck.trace import Facts, Failure, GraphTrace, Host, NoGraph, Phase, SavedTensorModified, StepTrace, Trace

REPORT_NAME = "ampcheck.json"
_NOTE_HEAD = f"{NAME}: what is known of this failure"
_DIAGNOSED = "_ampcheck_diagnosed"
_NOTHING = contextlib.nullcontext()
# Ever more of the program around a failing line is run again, and each run is one like the step's.
_MOST_RERUNS = 3

Emit = Callable[[str], None]
FindBatch = Callable[[Iterable[FrameType]], Callable[[], object] | None]


class FindingsError(Exception):
    """A finding reached ``fail_on``. ``report`` is the report it is in."""

    def __init__(self, report: Report, findings: tuple[Finding, ...]) -> None:
        first = findings[0]
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        super().__init__(f"{first.severity}[{first.code}] {first.name}: {first.message}{more}")
        self.report = report


class Seen(NamedTuple):
    """What a step showed: its calls, and its autograd graph, where that was looked at."""

    phase: Phase
    step: StepTrace | None
    graph: GraphTrace | None

    def explains(self, facts: Facts | None) -> bool:
        """Whether the cause of such a failure is among what was seen."""
        graph = self.graph or GraphTrace()
        if isinstance(facts, SavedTensorModified):
            return any(stale.save is not None and stale.writes for stale in graph.stale[:1])
        return bool(graph.cut) if isinstance(facts, NoGraph) else True

    def added_to(self, trace: Trace) -> Trace:
        if self.graph is not None:
            trace = replace(trace, graph=self.graph)
        if self.step is None:
            return trace
        return replace(trace, training=self.step) if self.phase == "training" else replace(trace, evaluation=self.step)


def _codes(option: str, codes: Any) -> str | tuple[str, ...]:
    if isinstance(codes, str):
        return codes
    listed = tuple(codes) if isinstance(codes, Iterable) else (codes,)
    if not all(isinstance(code, str) for code in listed):
        raise TypeError(f"{option} takes rule codes as strings, not {codes!r}")
    return listed


class AmpChecker:
    """Checks one training run.

    ``select`` and ``ignore`` take rule codes or their beginnings; ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) raises ``FindingsError`` out of ``attach`` and of the watched step; ``watch_steps`` training steps
    are watched; ``report`` is the path of the JSON report, true for ``ampcheck.json`` in the directory that the host
    names, or false for none. Raises ``ValueError`` for options that mean nothing, ``TypeError`` for one of another
    type.

    But for ``FindingsError``, no method raises: a fault of AmpCheck's own becomes one warning, and the checker
    switches itself off.
    """

    def __init__(
        self,
        *,
        select: str | Iterable[str] = (),
        ignore: str | Iterable[str] = (),
        fail_on: str = "never",
        watch_steps: int = 1,
        report: bool | str | os.PathLike[str] = True,
    ) -> None:
        if isinstance(watch_steps, bool) or not isinstance(watch_steps, int) or watch_steps < 0:
            raise ValueError(f"watch_steps must be a number of steps, 0 or more, not {watch_steps!r}")
        if not isinstance(report, (bool, str, os.PathLike)):
            raise TypeError(f"report must be a path, true or false, not {type(report).__name__}")
        select, ignore = _codes("select", select), _codes("ignore", ignore)
        self._options: dict[str, Any] = {"select": select, "ignore": ignore, "fail_on": fail_on}
        self._options |= {"watch_steps": watch_steps, "report": report}
        self._rules = selected(select, ignore)
        self._fail_on = threshold(fail_on)
        self._watch_steps = watch_steps
        self._destination = report
        self._reset()

    def _reset(self) -> None:
        self._model: nn.Module | None = None
        self._entry: nn.Module | None = None
        self._emit: Emit | None = None
        self._directory: Path | None = None
        self._trace = Trace()
        self._report: Report | None = None
        self._told: list[Finding] = []
        self._heard: dict[int, tuple[Finding, ...]] = {}
        self._training_left = 0
        self._evaluation_left = False
        self._open: list[WatchedStep] = []
        self._died: Seen | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._scaler: torch.amp.GradScaler | None = None
        self._off = False
        self._unwritable = False

    @property
    def options(self) -> dict[str, Any]:
        """A copy of the options that it was made with, by name."""
        return dict(self._options)

    @property
    def report(self) -> Report | None:
        """What is known so far; ``None`` before ``attach``."""
        return self._report

    @property
    def watching(self) -> bool:
        """Whether a training step is left to watch."""
        return self._training_left > 0

    @property
    def watching_evaluation(self) -> bool:
        """Whether the first evaluation step is still to be watched."""
        return self._evaluation_left

    def attach(
        self,
        model: nn.Module,
        *,
        precision: Precision | None = None,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        scaler: torch.amp.GradScaler | None = None,
        averaged: nn.Module | None = None,
        host: Host | None = None,
        emit: Emit | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> Report | None:
        """Fit start: walk over ``model``, ``optimizers``, ``scaler`` and the ``averaged`` copy of the model, judge,
        and report through ``emit``, one call a message, on rank 0 (default: standard error).

        Called again before ``detach`` it looks anew at what it is given, and reports only what is new. ``None``:
        AmpCheck failed and switched itself off. Raises ``FindingsError``.
        """
        try:
            again = self._model is not None
            if not again:
                self._reset()
            if self._off:
                return None
            self._emit, self._directory = emit, Path(directory) if directory is not None else None
            self._entry, self._model = model, unwrapped(model)
            self._optimizers, self._scaler = list(optimizers), scaler
            with alone():
                info = replace(walk(self._model), compiled=is_compiled(model))
                scaling = scaler is not None and scaler.is_enabled()
                self._trace = replace(
                    self._trace,
                    precision=precision_by_policy(info, precision or Precision(), scaling),
                    environment=environment(),
                    host=host,
                    model=info,
                    optimizers=tuple(examine_optimizer(optimizer, self._model) for optimizer in self._optimizers),
                    scaler=examine_scaler(scaler) if scaler is not None else None,
                    averaged=walk(averaged) if averaged is not None else None,
                )
            if not again:
                self._expect(info.device_type)
            self._judge("fit start", lambda findings: fit_line(self._trace, findings), quiet=again)
            self._enforce()
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - promise: it never makes training fail
            self.switch_off(error)
        return None if self._off else self._report

    def scaled_by(self, scaler: torch.amp.GradScaler, precision: Precision) -> None:
        """The gradient scaler of the run showed itself in a step that is being watched, and with it what is asked
        for. What is judged from now on takes them into account."""
        if self._off or self._trace.model is None:
            return
        try:
            self._scaler = scaler
            precision = precision_by_policy(self._trace.model, precision, scaler.is_enabled())
            self._trace = replace(self._trace, scaler=examine_scaler(scaler), precision=precision)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def training_step(
        self, autocast: AutocastProbe | None = None, *, batch: FindBatch | None = None
    ) -> AbstractContextManager[object]:
        """Probes around a training step while steps are left to watch, else nothing.

        Exceptions of the body pass through. Leaving it need not nest with other ``with`` blocks, but must happen in
        the thread that entered. Raises ``FindingsError`` where the watched step ends. ``autocast`` is a probe that
        has been active for longer than the step, and so knows the regions around it. ``batch`` is called
        where backward may have used a tensor that was overwritten unseen, with the frames that run it, innermost first:
        it returns the ``batch`` of ``diagnose`` for this step, or ``None``.
        """
        return self._step("training", None, autocast, batch) if self._training_left > 0 else _NOTHING

    def evaluation_step(
        self, model: nn.Module | None = None, autocast: AutocastProbe | None = None
    ) -> AbstractContextManager[object]:
        """The same for the first evaluation step. ``model`` is what is evaluated where it is another object than the
        model that trains: an averaged or half-precision copy."""
        return self._step("evaluation", model, autocast) if self._evaluation_left else _NOTHING

    def diagnose(
        self,
        error: BaseException,
        *,
        phase: str = "training_step",
        step: int | None = None,
        batch: Callable[[], object] | None = None,
    ) -> None:
        """Attach what is known of ``error`` to it as a note. The caller raises it on, by a bare ``raise``.

        ``batch`` computes the loss of the failing batch once more, as the host does, on the module without its
        wrappers, and returns it. It is called, with everything put back afterwards, for a failure of a training step
        whose lines are not known. Without it, and outside of a host, the statements of the loop that failed are run
        again in its place. An exception is diagnosed once, and one that has nothing to do with precision or autograd
        gets no note.
        """
        try:
            if self._off or not isinstance(error, Exception) or isinstance(error, FindingsError):
                return
            if getattr(error, _DIAGNOSED, False):
                return
            with contextlib.suppress(AttributeError):
                setattr(error, _DIAGNOSED, True)
            if sys.version_info < (3, 11):
                hide_frames(error)
            with torch._C.DisableTorchFunction():
                failure = examine(error, model=self._model, phase=phase, step=step)
            if failure.internal_error is not None:
                self.switch_off(RuntimeError(f"{failure.internal_error}, while a failure was examined"))
                return
            trace = replace(self._trace, failure=failure)
            # A step that died is no watched step, but what it showed explains the failure.
            watched = [self._died, *(Seen(step.phase, step.trace(), step.graph()) for step in self._open)]
            seen = [one for one in watched if one is not None]
            unexplained = failure.of_the_graph or (failure.facts is not None and not seen)
            fault: Exception | None = None
            if unexplained and failure.phase in ("forward", "backward"):
                try:
                    seen += self._replay(error, failure.facts, [batch] if batch is not None else self._reruns(error))
                except Exception as own:  # noqa: BLE001 - what is known without a replay is told first
                    fault = bare(own)
            for one in seen:
                trace = one.added_to(trace)
            self._died = None
            self._tell_failure(error, failure, trace)
            if fault is not None:
                self.switch_off(fault)
        except Exception as fault:  # noqa: BLE001 - the user's exception stays in front, whatever happens to ours
            self.switch_off(fault)

    def _reruns(self, error: Exception) -> Iterable[Callable[[], object]]:
        """A host runs its own loop; the source of a plain one says what it does."""
        if self._trace.host is not None:
            return ()
        return itertools.islice(of_traceback(error.__traceback__), _MOST_RERUNS)

    def _replay(
        self, error: Exception | None, facts: Facts | None, steps: Iterable[Callable[[], object]]
    ) -> list[Seen]:
        """What the first of ``steps`` shows that fails like ``error``, with these facts, and explains it; else what the
        last did that fails so, else the first."""
        model, info = self._model, self._trace.model
        found: list[Seen] = []
        if model is None or info is None:
            return found
        for step in steps:
            runs: list[WatchedStep] = []

            def probes(runs: list[WatchedStep] = runs) -> WatchedStep:
                runs.append(WatchedStep("training", model, info.device_type, lambda *_: None, replayed=True))
                return runs[-1]

            outcome = replay(
                step,
                lambda raised, runs=runs: (runs[-1].trace(), runs[-1].graph(raised)),  # type: ignore[misc]
                model=model,
                error=error,
                probes=probes,
                optimizers=self._optimizers,
                scaler=self._scaler,
            )
            shown, graph = outcome.seen or (None, None)
            seen = Seen("training", shown, replace(graph or GraphTrace(), replay=outcome.said))
            if outcome.failed_again or not found:
                found = [seen]
            if outcome.failed_again and seen.explains(facts):
                break
        return found

    def _suspected(self, step: WatchedStep, frame: FrameType) -> None:
        """Backward may have used a stale tensor that PyTorch did not notice: a replay shows whether it did."""
        try:
            if self._off:
                return
            if step.batch is not None:
                batch = step.batch(one for one, _ in walk_stack(frame))
                steps: Iterable[Callable[[], object]] = () if batch is None else (batch,)
            else:
                steps = () if self._trace.host is not None else itertools.islice(of_frame(frame), _MOST_RERUNS)
            for again in steps:
                seen = next(iter(self._replay(None, None, [again])), None)
                if seen is not None and seen.graph is not None and (seen.graph.stale or seen.graph.unchecked):
                    step.replayed = replace(seen.graph, replay=None)
                    return
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def _tell_failure(self, error: Exception, failure: Failure, trace: Trace) -> None:
        findings, not_judged = judge(trace, self._rules)
        new = [finding for finding in findings if finding not in self._told]
        self._report = Report(trace, findings, not_judged)
        crashes = {rule.code for rule in self._rules if "failure" in rule.needs}
        telling = [finding for finding in new if finding.severity is Severity.ERROR or finding.code in crashes]
        if telling and failure.facts is not None:
            self._told += telling
            blocks = [render_finding(finding, trace).plain for finding in told(telling)]
            self._add_note(error, "\n".join([_NOTE_HEAD, *blocks]))
        self._write()

    def detach(self) -> None:
        """Remove everything and let go of the model. What could not be judged is said once. May be called again."""
        try:
            self._abandon()
            report, attached = self._report, self._model is not None
            if attached and report and report.not_judged and not report.trace.failure and not self._off and rank() == 0:
                self._say(not_judged_line(report.not_judged))
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)
        finally:
            self._model = self._entry = self._scaler = None
            self._optimizers = []
            self._training_left = 0
            self._evaluation_left = False

    def start_over(self) -> None:
        """What was attached is not the model that trains: forget it, and what was seen of it."""
        try:
            self._abandon()
            self._reset()
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def nothing_seen(
        self, reason: str, *, emit: Emit | None = None, directory: str | os.PathLike[str] | None = None
    ) -> None:
        """The run is over and no model was ever attached: say that nothing could be judged, and why."""
        try:
            self._reset()
            self._emit, self._directory = emit, Path(directory) if directory is not None else None
            unobserved = dict.fromkeys(("model", "training", "evaluation"), reason)
            self._trace = Trace(environment=environment(), unobserved=unobserved)
            self._report = Report(self._trace, *judge(self._trace, self._rules))
            if rank() == 0:
                self._say(Text(f"{NAME}  nothing was judged: {reason}"))
            self._write()
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def switch_off(self, error: Exception, *, emit: Emit | None = None) -> None:
        """A fault of AmpCheck's own: one warning, and nothing more of it in this run. ``emit`` takes the warning where
        ``attach`` has not said yet who does."""
        if self._off:
            return
        self._off = True
        self._emit = self._emit or emit
        self._training_left = 0
        self._evaluation_left = False
        said = f"{type(error).__name__}: {error}"
        try:
            self._abandon()
            self._trace = replace(self._trace, internal_error=said)
            findings, not_judged = judge(self._trace, [internal_error])
            self._report = Report(self._trace, findings, not_judged)
            for finding in findings:
                self._say(render_finding(finding, self._trace))
        except Exception:  # noqa: BLE001
            with contextlib.suppress(Warning):
                text = f"AmpCheck switched itself off: {said}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _expect(self, device_type: str) -> None:
        """What is to be watched in this run, and what to say of it until it was."""
        unobserved = {
            "training": "no training step was watched",
            "evaluation": "no evaluation step was watched",
            "uncompiled": "what runs inside compiled code is not watched",
        }
        watchable = torch.amp.is_autocast_available(device_type)
        if not watchable:
            reason = f"the model is on the device {device_type!r}, for which PyTorch has no autocast"
            unobserved |= {"training": reason, "evaluation": reason}
        self._trace = replace(self._trace, unobserved=unobserved)
        self._training_left = self._watch_steps if watchable else 0
        self._evaluation_left = watchable and self._watch_steps > 0

    def _step(
        self,
        phase: Phase,
        model: nn.Module | None,
        autocast: AutocastProbe | None,
        batch: FindBatch | None = None,
    ) -> AbstractContextManager[object]:
        try:
            watched, info = self._model, self._trace.model
            if watched is None or info is None:
                return _NOTHING
            other = None
            entries = (model, self._entry, watched)
            entry = next(one for one in entries if one is not None)
            compiled = anything_compiled() and is_compiled(entry)
            if model is not None and unwrapped(model) is not watched:
                watched = unwrapped(model)
                other = walk(watched)
            step = WatchedStep(
                phase, watched, info.device_type, self._ended, info=other, autocast=autocast,
                suspected=self._suspected, batch=batch, entry=entry, compiled=compiled,
            )  # fmt: skip
            self._open.append(step)
            return step
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)
            return _NOTHING

    def _ended(self, step: WatchedStep, error: BaseException | None) -> None:
        """Take in what a step showed, and report when the last one to watch is done."""
        if step not in self._open:
            return
        self._open.remove(step)
        try:
            seen = Seen(step.phase, step.trace(), step.graph())
            if error is not None:
                self._died = seen
            elif seen.step is not None and seen.step.calls:
                self._take(seen.phase, seen.step, seen.graph)
            if error is None:
                self._enforce()
        except FindingsError:
            raise
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)

    def _take(self, phase: Phase, seen: StepTrace, graph: GraphTrace | None) -> None:
        seen = merged(self._trace.training if phase == "training" else self._trace.evaluation, seen)
        self._trace = Seen(phase, seen, graph).added_to(self._trace)
        if phase == "evaluation":
            self._evaluation_left = False
        else:
            self._training_left -= 1
        if phase == "evaluation" or self._training_left == 0:
            self._judge(phase, lambda findings: step_line(phase, seen, findings))

    def _judge(self, stage: str, line: Callable[[tuple[Finding, ...]], Text], *, quiet: bool = False) -> None:
        findings, not_judged = judge(self._trace, self._rules)
        heard = gather(stage, findings) or {rank(): findings}
        self._heard |= heard
        pairs = merged_findings(self._heard, heard)
        self._report = Report(self._trace, tuple(telling for _, telling in pairs), not_judged)
        # Which ranks are heard in time differs from stage to stage, and so does what is said of them.
        unsaid = [pair for pair in pairs if pair[0] not in self._told]
        self._told += [finding for finding, _ in unsaid]
        new = tuple(telling for _, telling in unsaid)
        if rank() != 0:
            return
        if new or not quiet:
            self._say(line(new))
        for finding in new:
            self._say(render_finding(finding, self._trace))
        self._write()

    def _enforce(self) -> None:
        if self._report is not None and not self._off:
            reached = reaching(self._report.findings, self._fail_on)
            if reached:
                raise FindingsError(self._report, reached)

    def _abandon(self) -> None:
        while self._open:
            self._open.pop().abandon()

    def _say(self, text: Text) -> None:
        if self._emit is not None:
            self._emit(text.plain)
            return
        # Rich ends the program where its own file is a pipe that nobody reads.
        rendered = io.StringIO()
        colors = sys.stderr is not None and sys.stderr.isatty()
        Console(file=rendered, soft_wrap=True, highlight=False, force_terminal=colors).print(text)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(rendered.getvalue())
            sys.stderr.flush()

    def _write(self) -> None:
        if self._report is None or rank() != 0 or self._destination is False or self._unwritable:
            return
        if self._destination is not True:
            path = Path(self._destination)
        elif self._directory is not None:
            path = self._directory / REPORT_NAME
        else:
            return
        try:
            self._report.write(path)
        except (OSError, ValueError) as error:
            self._unwritable = True
            why = getattr(error, "strerror", None) or error
            self._say(Text(f"{NAME}  the report could not be written to {shown(str(path))}: {why}"))

    def _add_note(self, error: BaseException, note: str) -> None:
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            # Python 3.10 keeps no notes and shows none.
            error.__notes__ = [*getattr(error, "__notes__", ()), note]
            self._say(Text(note))
