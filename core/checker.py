"""The checker that adapters wrap: attach at fit start, watch a step, diagnose a failure, detach."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from rich.text import Text
from torch import nn

from ampcheck.failure import examine
from ampcheck.observe.again import FailedAgain
from ampcheck.observe.edited import Edited, keeps_effect
from ampcheck.observe.numerics import Numerics
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import bare, hide_frames
from ampcheck.observe.probes.modes import alone
from ampcheck.observe.probes.saved_tensors import stale_behind
from ampcheck.observe.rerun import leaves_not_finite, of_frame, of_traceback
from ampcheck.observe.step import WatchedStep
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
from ampcheck.report.ranks import rank
from ampcheck.report.teller import Emit, Line, Log, Teller
from ampcheck.report.text import NAME, export_line, fit_line, step_line
from ampcheck.rules.internal_error import internal_error
from ampcheck.rules.judging import judge, reaching, selected, threshold
from ampcheck.rules.rule import Edit, Finding, Severity
from ampcheck.run import FindBatch, Held, Rerun, Run
from ampcheck.trace import (
    Export,
    Failure,
    GraphFreed,
    GraphTrace,
    Host,
    NoGraph,
    NonFinite,
    Phase,
    SavedTensorModified,
    Trace,
    ValueRejected,
)

_DIAGNOSED = "_ampcheck_diagnosed"
_EXPORT = "_ampcheck_export"
_NOTHING = contextlib.nullcontext()
# Each rerun covers more of the program around the failing line, and costs about as much as the step.
_MOST_RERUNS = 4
NUMERICS = ("off", "free", "guard", "stop")


class FindingsError(Exception):
    """A finding reached ``fail_on``. ``report`` is the report that contains it."""

    def __init__(self, report: Report, findings: tuple[Finding, ...]) -> None:
        first = findings[0]
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        super().__init__(f"{first.severity}[{first.code}] {first.name}: {first.message}{more}")
        self.report = report


def _codes(option: str, codes: Any) -> str | tuple[str, ...]:
    if isinstance(codes, str):
        return codes
    listed = tuple(codes) if isinstance(codes, Iterable) else (codes,)
    if not all(isinstance(code, str) for code in listed):
        raise TypeError(f"{option} takes rule codes as strings, not {codes!r}")
    return listed


class AmpChecker:
    """Checks one training run.

    ``select`` and ``ignore`` take rule codes or prefixes of them. ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) makes ``attach`` and the watched step raise ``FindingsError``. ``watch_steps`` is the number of
    training steps to watch. ``report`` is the path of the JSON report, true for ``ampcheck.json`` in the directory that
    the host names, or false for none. ``exports``: whether the exports that the run makes are compared. ``numerics``
    says how to look for losses and gradients that are not finite: ``"free"`` only where training stops anyway,
    ``"guard"`` once a step, ``"stop"`` once a step before the optimizer's, raising ``FloatingPointError``, and
    ``"off"`` not at all. Raises ``ValueError`` for invalid options, ``TypeError`` for options of the wrong type.

    No method raises anything but ``FindingsError``: a fault in AmpCheck itself becomes one warning, and the checker
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
        exports: bool = True,
        numerics: str = "free",
    ) -> None:
        if numerics not in NUMERICS:
            raise ValueError(f"numerics must be 'off', 'free', 'guard' or 'stop', not {numerics!r}")
        if isinstance(watch_steps, bool) or not isinstance(watch_steps, int) or watch_steps < 0:
            raise ValueError(f"watch_steps must be a number of steps, 0 or more, not {watch_steps!r}")
        if not isinstance(report, (bool, str, os.PathLike)):
            raise TypeError(f"report must be a path, true or false, not {type(report).__name__}")
        select, ignore = _codes("select", select), _codes("ignore", ignore)
        self._options: dict[str, Any] = {"select": select, "ignore": ignore, "fail_on": fail_on}
        self._options |= {"watch_steps": watch_steps, "report": report, "exports": exports, "numerics": numerics}
        self._rules = selected(select, ignore)
        self._fail_on = threshold(fail_on)
        self._watch_steps = watch_steps
        self._destination = report
        self.follows_exports = exports
        self._numerics = numerics
        self._run = self._new_run()

    def _new_run(self) -> Run:
        return Run(Teller(self._destination))

    @property
    def options(self) -> dict[str, Any]:
        """A copy of the options it was made with, by name."""
        return dict(self._options)

    @property
    def report(self) -> Report | None:
        """The report so far; ``None`` before ``attach``."""
        return self._run.report

    @property
    def watching(self) -> bool:
        """Whether training steps are left to watch."""
        return self._run.training_left > 0

    @property
    def watching_evaluation(self) -> bool:
        """Whether the first evaluation step is still to be watched."""
        return self._run.evaluation_left

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
        log: Log | None = None,
        directory: str | os.PathLike[str] | None = None,
        first_step: int | None = 0,
    ) -> Report | None:
        """Start a fit: look at the model and what trains it, judge, and report.

        Walks over ``model``, ``optimizers``, ``scaler`` and the ``averaged`` copy of the model. Reports on rank 0, one
        call a message, through ``log``, such as a logger's method of that name, at the level of a finding's severity,
        or through ``emit``, which takes no level (default: standard error). Called again before ``detach``, it looks
        again at what it is given, and reports only what is new. ``first_step`` is the number of optimizer steps before
        this fit, such as those before a resume; ``None`` if it cannot be told. Returns ``None`` if AmpCheck failed
        and switched itself off. Raises ``FindingsError``.
        """
        try:
            again = self._run.held is not None
            run = self._run if again or self._run.waiting else self._new_run()
            self._run = run
            if run.off:
                return None
            run.teller.emit, run.teller.log = emit, log
            run.teller.directory = Path(directory) if directory is not None else None
            run.thread = threading.get_ident()
            run.held = held = Held(model, unwrapped(model), tuple(optimizers), scaler, averaged)
            with alone():
                info = replace(walk(held.model), compiled=is_compiled(model))
                scaling = scaler is not None and scaler.is_enabled()
                run.trace = replace(
                    run.trace,
                    precision=precision_by_policy(info, precision or Precision(), scaling),
                    environment=environment(),
                    host=host,
                    model=info,
                    optimizers=tuple(examine_optimizer(optimizer, held.model) for optimizer in held.optimizers),
                    scaler=examine_scaler(scaler) if scaler is not None else None,
                    averaged=walk(averaged) if averaged is not None else None,
                )
            if not again:
                run.expect(self._watch_steps, info.device_type)
            run.numerics = run.numerics or self._looking(held, info.device_type)
            if run.numerics is not None:
                # A host counts the steps of all optimizers together.
                run.numerics.first_step = first_step if host is None or len(held.optimizers) < 2 else None
            if run.numerics is not None:
                run.numerics.scaled_by(scaler)
                if self._numerics != "free":
                    run.numerics.begin()
            self._judge("fit start", lambda findings: fit_line(run.trace, findings), quiet=again)
            self.enforce()
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - promise: it never makes training fail
            self.switch_off(error)
        return None if self._run.off else self._run.report

    def scaled_by(self, scaler: torch.amp.GradScaler, precision: Precision) -> None:
        """Take in the gradient scaler that a watched step has shown, and the precision that it implies.

        What is judged from now on takes both into account.
        """
        run = self._run
        if run.off or run.held is None or run.trace.model is None:
            return
        try:
            run.held = run.held._replace(scaler=scaler)
            precision = precision_by_policy(run.trace.model, precision, scaler.is_enabled())
            run.trace = replace(run.trace, scaler=examine_scaler(scaler), precision=precision)
            if run.numerics is not None:
                run.numerics.scaled_by(scaler)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def optimized_by(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Take into account optimizers that showed themselves by stepping."""
        run = self._run
        if run.off or run.held is None:
            return
        try:
            held = run.held = run.held._replace(optimizers=(*run.held.optimizers, *optimizers))
            examined = tuple(examine_optimizer(optimizer, held.model) for optimizer in held.optimizers)
            run.trace = replace(run.trace, optimizers=examined)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def averaged_by(self, copy: nn.Module) -> None:
        """Take into account a copy of the model that turned out to be an average of its weights."""
        run = self._run
        if run.off or run.trace.model is None:
            return
        try:
            run.trace = replace(run.trace, averaged=walk(copy))
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def training_step(
        self, autocast: AutocastProbe | None = None, *, batch: FindBatch | None = None
    ) -> AbstractContextManager[object]:
        """Watch a training step while steps are left to watch; otherwise do nothing.

        Exceptions of the body pass through. Leaving the context need not nest with other ``with`` blocks, but must
        happen in the thread that entered it. Raises ``FindingsError`` when the watched step ends. ``autocast`` is a
        probe that has been active for longer than the step, and so knows the regions around it. If backward may have
        used a tensor that was overwritten unseen, ``batch`` is called with the frames that run it, innermost first: it
        returns the ``batch`` of ``diagnose`` for this step, or ``None``.
        """
        self._run.find_batch = batch
        return self._step("training", None, autocast, batch) if self._run.training_left > 0 else _NOTHING

    def evaluation_step(
        self, model: nn.Module | None = None, autocast: AutocastProbe | None = None
    ) -> AbstractContextManager[object]:
        """Watch the first evaluation step in the same way.

        ``model`` is what is evaluated, if that is not the model that trains but an averaged or half-precision copy.
        """
        return self._step("evaluation", model, autocast) if self._run.evaluation_left else _NOTHING

    def diagnose(
        self,
        error: BaseException,
        *,
        phase: str = "training_step",
        step: int | None = None,
        batch: Rerun | None = None,
        swallowed: bool = False,
    ) -> None:
        """Attach what is known of ``error`` to it as a note. The caller re-raises it with a bare ``raise``.

        ``batch`` computes the loss of the failing batch once more, as the host does, on the unwrapped module, and
        returns it. It is called for a failure of a training step whose lines are not known, and everything is put back
        afterwards. Without it, and outside a host, the statements of the failing loop run again instead. An exception
        is diagnosed once. It gets no note if it has nothing to do with precision or autograd. ``swallowed``: nobody
        shows the exception, so that its note is reported as well.
        """
        try:
            run = self._run
            if run.off or not isinstance(error, Exception) or isinstance(error, FindingsError):
                return
            if not swallowed:
                run.left.update(_exports_behind(error))
            number = getattr(error, _DIAGNOSED, 0)
            if number:
                # What seemed caught has come through.
                if number <= len(run.failures):
                    run.report = run.failures[number - 1]
                    run.teller.write(run.report)
                return
            with contextlib.suppress(AttributeError):
                setattr(error, _DIAGNOSED, len(run.failures) + 1)
            if sys.version_info < (3, 11):
                hide_frames(error)
            with torch._C.DisableTorchFunction():
                failure = examine(error, model=run.held and run.held.model, phase=phase, step=step)
            if failure.internal_error is not None:
                self.switch_off(RuntimeError(f"{failure.internal_error}, while examining a failure"))
                return
            # A step that died does not count as watched, but what it showed explains the failure.
            seen = [one for one in (run.died, *(step.seen() for step in run.open)) if one is not None]
            run.died = None
            again: FailedAgain | None = None
            fault: Exception | None = None
            unexplained = failure.of_the_graph or (failure.facts is not None and not seen)
            if unexplained and failure.phase in ("forward", "backward"):
                try:
                    again = self._failing_again(error, failure, batch)
                    seen += [again.seen] if again is not None else []
                except Exception as own:  # noqa: BLE001 - first report what is known without a replay
                    fault = bare(own)
            trace = replace(run.trace, failure=failure)
            for one in seen:
                trace = trace.showing(one)
            if isinstance(failure.facts, ValueRejected):
                steps = functools.partial(self._failed_steps, error, batch, numbers=True)
                trains = run.numerics is not None and threading.get_ident() == run.thread
                found = run.numerics.rejected(error, steps, step) if run.numerics is not None and trains else None
                if found is not None:
                    trace = replace(trace, numbers=(replace(found, precision=trace.precision.dtype),))
            if isinstance(failure.facts, SavedTensorModified) and run.held is not None:
                graph = trace.graph or GraphTrace()
                if not graph.stale:
                    # The graph is still there, behind the exception.
                    trace = replace(trace, graph=replace(graph, stale=stale_behind(error, run.held.model)))
            report = self._judge_failure(trace, functools.partial(self._runs_with, error, batch, again))
            if failure.facts is not None:
                crashes = {rule.code for rule in self._rules if {"failure", "numbers"}.intersection(rule.needs)}
                findings = (one for one in report.findings if one.severity is Severity.ERROR or one.code in crashes)
                run.teller.note(error, findings, trace, aloud=swallowed)
            run.failures.append(report)
            run.teller.write(report)
            if fault is not None:
                self.switch_off(fault)
        except Exception as fault:  # noqa: BLE001 - the user's exception stays in front, whatever happens to ours
            self.switch_off(fault)

    def look(self, moment: str, *, steps: int | None = None, loss: float | None = None) -> None:
        """Look at the numbers where training stops anyway: at weights, statistics, the averaged model and the scale.

        ``moment`` says when that is (``"at the end of epoch 3"``), ``steps`` how many optimizer steps the host has
        asked for since fit start, skipped ones included, ``loss`` a loss that the host has read. If something is wrong,
        the numbers of the next steps are looked at too. Raises ``FindingsError``.
        """
        run = self._run
        # A failure is what the report is about from then on.
        if run.off or run.numerics is None or (run.report is not None and run.report.trace.failure is not None):
            return
        try:
            state, skips = run.numerics.look(moment, steps)
            seen = None
            if loss is not None and not math.isfinite(loss) and state is None and not run.trace.numbers:
                seen = NonFinite("loss", loss=loss, precision=run.trace.precision.dtype, said=f"it was seen {moment}")
            if seen is not None and self._numerics == "free":
                run.trace = replace(run.trace, numbers=(seen,))
            run.trace = replace(run.trace, state=run.trace.state or state, skips=skips)
            findings = self._tell_own()
            # Weights that are lost say nothing more.
            lost = state is not None and state.parameters
            troubled = state is not None or seen is not None or any(one.code == "AMP512" for one in findings)
            if troubled and not lost and self._numerics == "free":
                run.numerics.rearm(steps)
            self.enforce()
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def exited(self, error: SystemExit) -> None:
        """Explain an exit of the program, if it left because of a number that is not finite."""
        run = self._run
        if run.off or run.numerics is None or not leaves_not_finite(error.__traceback__):
            return
        try:
            steps = functools.partial(self._failed_steps, error, None, numbers=True)
            found = run.numerics.rejected(error, steps, None)
            if found is not None:
                self._not_finite(found, stop=False)
        except FindingsError:
            raise
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)

    def _tell_own(self, error: Exception | None = None) -> tuple[Finding, ...]:
        """Judge anew and report on this rank alone, where others may be in another step; as a note on ``error``."""
        run = self._run
        findings, not_judged = judge(run.trace, self._rules)
        told = run.report.findings if run.report is not None else ()
        # What other ranks found stays found.
        others = tuple(one for one in told if one.code < "AMP5" and not any(_is_same(one, own) for own in findings))
        counted = [one.severity for one in told if one.code == "AMP512"]
        own = (*map(self._tried, findings), *others)
        run.report = Report(run.trace, self._with_survived(own), not_judged)
        if error is not None:
            run.teller.note(error, run.report.findings, run.trace)
            run.teller.write(run.report)
        else:
            # Its numbers are new at each look.
            again = [one for one in findings if one.code == "AMP512" and one.severity in counted]
            run.teller.tell_own(run.report, (*again, *others))
        return findings

    def _looking(self, held: Held, device_type: str) -> Numerics | None:
        """What looks at the numbers of this run."""
        if self._numerics == "off":
            return None
        return Numerics(
            held.model,
            device_type,
            held.optimizers,
            held.scaler,
            held.averaged,
            steps_of=self._running_steps,
            found=self._not_finite,
            failed=self.switch_off,
            every=self._numerics == "stop",
        )

    def _running_steps(self, frame: FrameType) -> Iterable[Rerun]:
        """What computes the loss of a running step again, smallest first."""
        find = self._run.find_batch
        if find is not None:
            batch = find(one for one, _ in walk_stack(frame))
            return () if batch is None else (batch,)
        if self._run.trace.host is not None:
            return ()
        return itertools.islice(of_frame(frame, numbers=True), _MOST_RERUNS)

    def _not_finite(self, found: NonFinite, *, stop: bool = True) -> None:
        """Report a step whose loss or gradients are not finite, and stop there if that was asked for."""
        run = self._run
        of_step = f" of step {found.step}" if found.step is not None else ""
        error = FloatingPointError(f"the {found.root}{of_step} is not finite")
        stop = stop and self._numerics == "stop"
        try:
            if run.off:
                return
            found = replace(found, precision=run.trace.precision.dtype)
            before = (one for one in run.trace.numbers or () if found.origin is None or one.origin is not None)
            run.trace = replace(run.trace, numbers=(*before, found))
            setattr(error, _DIAGNOSED, len(run.failures) + 1)
            self._tell_own(error if stop else None)
            self.enforce()
        except FindingsError:
            raise
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)
            return
        if stop:
            raise error

    def _failing_again(self, error: Exception, failure: Failure, batch: Rerun | None) -> FailedAgain | None:
        """What a replay shows of the failing batch or, in a plain loop, of the loop's own statements."""
        again = self._run.again()
        if again is None:
            return None
        return again.failing(error, self._failed_steps(error, batch), lambda graph: _explains(graph, failure))

    def _failed_steps(self, error: BaseException, batch: Rerun | None, *, numbers: bool = False) -> Iterable[Rerun]:
        if batch is not None:
            return (batch,)
        if self._run.trace.host is not None:
            # A host runs its own loop; the source of a plain loop says what it does.
            return ()
        return itertools.islice(of_traceback(error.__traceback__, numbers=numbers), _MOST_RERUNS)

    def _runs_with(self, error: Exception, batch: Rerun | None, failed: FailedAgain | None, edit: Edit) -> bool | None:
        """Whether the failing step runs with an edit; ``None`` where that cannot be tried."""
        again = self._run.again()
        if again is None or failed is None:
            return None
        try:
            steps = functools.partial(self._failed_steps, error, batch)
            return again.runs_with(Edited(edit.file, edit.line, edit.before, edit.after), steps, failed)
        except Exception as fault:  # noqa: BLE001 - the remedy is then one that was not tried
            bare(fault)
            return None

    def _suspected(self, step: WatchedStep, frame: FrameType) -> None:
        """Replay a step whose backward may have used a stale tensor unnoticed by PyTorch, to see whether it did."""
        try:
            again = self._run.again()
            if self._run.off or again is None:
                return
            if step.batch is not None:
                batch = step.batch(one for one, _ in walk_stack(frame))
                steps: Iterable[Rerun] = () if batch is None else (batch,)
            elif self._run.trace.host is not None:
                steps = ()
            else:
                steps = itertools.islice(of_frame(frame), _MOST_RERUNS)
            step.replayed = replace(again, changed=step.changed_parameters).suspected(steps)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def _judge_failure(self, trace: Trace, runs_with: Callable[[Edit], bool | None]) -> Report:
        watched = self._run.trace.training
        # Precision may differ from step to step on purpose: what a replay shows of it explains the failure alone.
        of_the_run = trace if watched is None else replace(trace, training=watched)
        findings, not_judged = judge(of_the_run, self._rules, failed=trace)
        tried = tuple(self._tried(finding, runs_with) for finding in findings)
        self._run.report = Report(trace, self._with_survived(tried), not_judged)
        return self._run.report

    def _with_survived(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        survived = (finding for finding in self._run.survived if finding not in findings)
        return tuple(sorted((*findings, *survived), key=lambda finding: (-finding.severity, finding.code)))

    def _tried(self, finding: Finding, runs_with: Callable[[Edit], bool | None] | None = None) -> Finding:
        """``finding`` with its edit tried; with the rule's own fix where the step does not run with the edit."""
        edit = finding.edit
        if edit is None:
            return finding
        tried = runs_with(edit) if runs_with is not None else None
        if tried is not False and keeps_effect(edit.file, edit.line, edit.after):
            return replace(finding, tried=tried)
        fix = next((rule.fix for rule in self._rules if rule.code == finding.code), "")
        return replace(finding, fix=fix, edit=None, tried=False if tried is False else None)

    def detach(self) -> None:
        """Remove everything and let go of the model. Report once what could not be judged. May be called again."""
        try:
            run = self._run
            run.abandon()
            self._settle_exports()
            report = run.report
            if run.held is not None and report is not None and report.trace.failure is None and not run.off:
                run.teller.say_not_judged(report.not_judged)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)
        finally:
            self._run.held = self._run.numerics = self._run.find_batch = None
            self._run.ended = True

    def start_over(self) -> None:
        """Forget the attached model and what was seen of it: it is not the model that trains."""
        try:
            before = self._run
            before.abandon()
            self._run = self._new_run()
            self._run.failures, self._run.survived = before.failures, before.survived
            self._run.trace = Trace(exports=before.trace.exports)
            self._run.teller.remember(self._judged(before.trace.exports))
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def diagnose_caught(self, error: Exception) -> Report | None:
        """Diagnose an exception that the program may catch, in the middle of what raised it.

        Returns the report on it, or ``None`` if nothing is known of it. If the program goes on, ``survive`` takes the
        report in; if the exception comes through after all, ``diagnose`` does.
        """
        run = self._run
        before, count = run.report, len(run.failures)
        self.diagnose(error)
        if run.off or len(run.failures) == count:
            return None
        run.report = before
        report = run.failures[-1]
        return report if report.trace.failure is not None and report.trace.failure.facts is not None else None

    def survive(self, report: Report, note: str) -> None:
        """Take in what was found on an exception after which the program went on. ``note`` is said, if not empty."""
        run = self._run
        try:
            if run.off:
                return
            crashes = {rule.code for rule in self._rules if "failure" in rule.needs}
            new = [one for one in report.findings if one.code in crashes and one not in run.survived]
            run.survived += tuple(new)
            if note:
                run.teller.say(Text(note), logging.ERROR)
            of_the_run = run.report or Report(run.trace, not_judged=report.not_judged)
            run.report = replace(of_the_run, findings=self._with_survived(of_the_run.findings))
            run.teller.write(run.report)
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)

    def nothing_seen(
        self, reason: str, *, emit: Emit | None = None, directory: str | os.PathLike[str] | None = None
    ) -> None:
        """Report, at the end of a run in which no model was attached, that nothing could be judged, and why."""
        try:
            before = self._run
            self._run = run = before if before.waiting else self._new_run()
            run.failures, run.survived = before.failures, before.survived
            run.teller.emit, run.teller.directory = emit, Path(directory) if directory is not None else None
            unobserved = dict.fromkeys(("model", "training", "evaluation"), reason)
            run.trace = replace(run.trace, environment=environment(), unobserved=unobserved)
            findings, not_judged = judge(run.trace, self._rules)
            run.report = Report(run.trace, self._with_survived(findings), not_judged)
            if rank() == 0 and not run.trace.exports:
                run.teller.say(Text(f"{NAME}  nothing was judged: {reason}"))
            run.teller.write(run.report)
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)

    def exported(
        self,
        export: Export,
        error: BaseException | None = None,
        *,
        emit: Emit | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Take an export of the program into the report; ``error`` is what it raised, and gets a note if it is known
        why. ``emit`` and ``directory`` are those of ``attach``, which may come later. Raises ``FindingsError``."""
        run = self._run
        if run.off:
            return
        try:
            run.teller.emit = run.teller.emit or emit
            run.teller.directory = run.teller.directory or (Path(directory) if directory is not None else None)
            findings = self._judged((export,))
            if error is not None:
                with contextlib.suppress(AttributeError):
                    setattr(error, _EXPORT, len(run.trace.exports))
            run.trace = replace(run.trace, exports=(*run.trace.exports, export))
            run.report = _with(run.report or Report(run.trace), run.trace, findings)
            if error is not None:
                run.teller.note(error, findings, run.trace)
            elif rank() == 0:
                run.teller.say(export_line(export))
                run.teller.say_findings(run.teller.remember(findings), run.trace)
            run.teller.write(run.report)
            if error is None:
                self.enforce()
        except FindingsError:
            raise
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)

    def _settle_exports(self) -> None:
        """Report the exports that died without the program dying of it."""
        run = self._run
        died = [
            (place, export.failure)
            for place, export in enumerate(run.trace.exports)
            if export.failure is not None and not export.failure.handled and place not in run.left
        ]
        if not died or run.off or run.report is None:
            return
        exports = list(run.trace.exports)
        for place, failure in died:
            exports[place] = replace(exports[place], failure=replace(failure, handled=True))
        before, after = self._judged(run.trace.exports), self._judged(exports)
        kept = tuple(finding for finding in run.report.findings if finding not in before)
        run.trace = replace(run.trace, exports=tuple(exports))
        trace = replace(run.report.trace, exports=run.trace.exports)
        run.report = _with(replace(run.report, findings=kept), trace, after)
        if rank() == 0:
            run.teller.say_findings(run.teller.remember(after), run.trace)
        run.teller.write(run.report)

    def _judged(self, exports: Iterable[Export]) -> tuple[Finding, ...]:
        return judge(Trace(host=self._run.trace.host, exports=tuple(exports)), self._rules)[0]

    def switch_off(self, error: Exception, *, emit: Emit | None = None) -> None:
        """Switch AmpCheck off for the rest of the run, with one warning about its own fault.

        ``emit`` takes the warning if ``attach`` has not yet said who does.
        """
        run = self._run
        if run.off:
            return
        run.off = True
        run.teller.emit = run.teller.emit or emit
        said = f"{type(error).__name__}: {error}"
        try:
            run.abandon()
            run.trace = replace(run.trace, internal_error=said)
            run.report = Report(run.trace, *judge(run.trace, [internal_error]))
            run.teller.say_findings(run.report.findings, run.trace)
        except Exception:  # noqa: BLE001
            with contextlib.suppress(Warning):
                text = f"AmpCheck switched itself off: {said}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _step(
        self,
        phase: Phase,
        model: nn.Module | None,
        autocast: AutocastProbe | None,
        batch: FindBatch | None = None,
    ) -> AbstractContextManager[object]:
        try:
            run, other = self._run, None
            held, info = run.held, run.trace.model
            if held is None or info is None:
                return _NOTHING
            watched, entry = held.model, model if model is not None else held.entry
            compiled = anything_compiled() and is_compiled(entry)
            if model is not None and unwrapped(model) is not watched:
                watched = unwrapped(model)
                other = walk(watched)
            step = WatchedStep(
                phase, watched, info.device_type, self._ended, info=other, autocast=autocast,
                suspected=self._suspected, batch=batch, entry=entry, compiled=compiled,
                float16=self._numerics != "off" and run.trace.precision.dtype == "float16",
                optimizers=held.optimizers,
            )  # fmt: skip
            run.open.append(step)
            return step
        except Exception as error:  # noqa: BLE001
            self.switch_off(error)
            return _NOTHING

    def _ended(self, step: WatchedStep, error: BaseException | None) -> None:
        """Take in what a step showed, and report when the last step to watch is done."""
        run = self._run
        if step not in run.open:
            return
        run.open.remove(step)
        try:
            seen = step.seen()
            if error is not None:
                run.died = seen
            elif seen.step is not None and seen.step.calls:
                together = run.take(seen.phase, seen.step, seen.graph)
                if seen.phase == "evaluation" or run.training_left == 0:
                    self._judge(seen.phase, functools.partial(step_line, seen.phase, together))
            if error is None:
                self.enforce()
        except FindingsError:
            raise
        except Exception as fault:  # noqa: BLE001
            self.switch_off(fault)

    def _judge(self, stage: str, line: Line, *, quiet: bool = False) -> None:
        run = self._run
        findings, not_judged = judge(run.trace, self._rules)
        report = Report(run.trace, self._with_survived(tuple(map(self._tried, findings))), not_judged)
        run.report = run.teller.tell(stage, report, line, quiet=quiet)

    def enforce(self) -> None:
        """Raise ``FindingsError`` if a finding reached ``fail_on``."""
        report = self._run.report
        if report is not None and not self._run.off:
            reached = reaching(report.findings, self._fail_on)
            if reached:
                raise FindingsError(report, reached)


def _is_same(one: Finding, other: Finding) -> bool:
    """Whether two findings are one, but for the ranks that it names."""
    return (one.code, one.module, one.sites, one.evidence) == (other.code, other.module, other.sites, other.evidence)


def _explains(graph: GraphTrace, failure: Failure) -> bool:
    """Whether what was seen contains the cause of the failure."""
    if isinstance(failure.facts, SavedTensorModified):
        return any(stale.save is not None and stale.writes for stale in graph.stale[:1])
    if isinstance(failure.facts, GraphFreed):
        return len(graph.backwards) > 1
    return bool(graph.cut) if isinstance(failure.facts, NoGraph) else True


def _with(report: Report, trace: Trace, findings: Iterable[Finding]) -> Report:
    """``report`` on ``trace``, with more findings, the most severe first."""
    together = sorted((*report.findings, *findings), key=lambda finding: (-finding.severity, finding.code))
    return replace(report, trace=trace, findings=tuple(together))


def _exports_behind(error: BaseException) -> set[int]:
    """The positions of the exports that raised ``error`` or one of its causes."""
    seen: dict[int, BaseException] = {}
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen[id(link)] = link
        link = link.__cause__ or link.__context__
    return {getattr(one, _EXPORT) for one in seen.values() if hasattr(one, _EXPORT)}
