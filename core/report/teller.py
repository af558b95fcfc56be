"""Report a run to the right place, and each finding once."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ampcheck.report.ranks import gather, merged_findings, rank
from ampcheck.report.report import Report
from ampcheck.report.text import NAME, not_judged_line, render_finding
from ampcheck.rules.rule import Finding, Severity
from ampcheck.source.printable import shown
from ampcheck.trace import Trace

REPORT_NAME = "ampcheck.json"
_LEVELS = {Severity.INFO: logging.INFO, Severity.WARNING: logging.WARNING, Severity.ERROR: logging.ERROR}
_NOTE_HEAD = f"{NAME}: what is known of this failure"

Emit = Callable[[str], None]
Log = Callable[[int, str], None]
Line = Callable[[tuple[Finding, ...]], Text]


class Teller:
    """Reports the findings of a run, each once.

    They go, on rank 0, through ``log`` (a logger's, which takes a level), else through ``emit``, else to standard
    error; and into the JSON report at ``destination`` (true: ``ampcheck.json`` in ``directory``; false: nowhere).
    """

    def __init__(self, destination: bool | str | os.PathLike[str] = False) -> None:
        self.emit: Emit | None = None
        self.log: Log | None = None
        self.directory: Path | None = None
        self._destination = destination
        self._told: list[Finding] = []
        self._heard: dict[int, tuple[Finding, ...]] = {}
        self._unwritable = False

    def tell(self, stage: str, report: Report, line: Line, *, quiet: bool = False) -> Report:
        """Report what is new in ``report`` and in what other ranks found at this stage.

        ``line`` makes the line above the findings. Returns the report with the findings of all ranks. ``quiet``: no
        line if nothing is new.
        """
        heard = gather(stage, report.findings) or {rank(): report.findings}
        self._heard |= heard
        pairs = merged_findings(self._heard, heard)
        # Which ranks are heard in time differs by stage, and so does what a finding says of them.
        unsaid = [pair for pair in pairs if pair[0] not in self._told]
        self._told += [finding for finding, _ in unsaid]
        new = tuple(telling for _, telling in unsaid)
        merged = replace(report, findings=tuple(telling for _, telling in pairs))
        if rank() == 0:
            if new or not quiet:
                self.say(line(new))
            self.say_findings(new, report.trace)
            self.write(merged)
        return merged

    def tell_own(self, report: Report, known: Iterable[Finding] = ()) -> None:
        """Report what is new in ``report`` on this rank, and not ``known``, without asking the others: they may be in
        another step."""
        self._told += known
        new = tuple(finding for finding in report.findings if finding not in self._told)
        self._told += new
        self.say_findings(new, report.trace)
        self.write(report)

    def note(self, error: BaseException, findings: Iterable[Finding], trace: Trace, *, aloud: bool = False) -> None:
        """Attach those of ``findings`` that were not reported yet to ``error``. ``aloud``: nobody shows ``error``."""
        new = [finding for finding in findings if finding not in self._told]
        if not new:
            return
        self._told += new
        note = "\n".join([_NOTE_HEAD, *(render_finding(finding, trace).plain for finding in new)])
        # Python 3.10 neither keeps notes nor shows them.
        keeps = hasattr(error, "add_note")
        if keeps:
            error.add_note(note)
        else:
            error.__notes__ = [*getattr(error, "__notes__", ()), note]
        if aloud or not keeps:
            self.say(Text(note), logging.ERROR)

    def remember(self, findings: Iterable[Finding]) -> list[Finding]:
        """The findings that were not reported yet, from now on taken as reported."""
        new = [finding for finding in findings if finding not in self._told]
        self._told += new
        return new

    def say_not_judged(self, not_judged: Mapping[str, str]) -> None:
        if not_judged and rank() == 0:
            self.say(not_judged_line(not_judged))

    def say_findings(self, findings: Iterable[Finding], trace: Trace) -> None:
        for finding in findings:
            self.say(render_finding(finding, trace), _LEVELS[finding.severity])

    def say(self, text: Text, level: int = logging.INFO) -> None:
        if self.log is not None:
            self.log(level, text.plain)
            return
        if self.emit is not None:
            self.emit(text.plain)
            return
        # Rich ends the program if its own file is a pipe that nobody reads.
        rendered = io.StringIO()
        colors = sys.stderr is not None and sys.stderr.isatty()
        Console(file=rendered, soft_wrap=True, highlight=False, force_terminal=colors).print(text)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(rendered.getvalue())
            sys.stderr.flush()

    def write(self, report: Report) -> None:
        """Write the JSON report, on rank 0. If that fails, say so once."""
        if rank() != 0 or self._destination is False or self._unwritable:
            return
        if self._destination is not True:
            path = Path(self._destination)
        elif self.directory is not None:
            path = self.directory / REPORT_NAME
        else:
            return
        try:
            report.write(path)
        except (OSError, ValueError) as error:
            self._unwritable = True
            why = getattr(error, "strerror", None) or error
            self.say(Text(f"{NAME}  the report could not be written to {shown(str(path))}: {why}"))
