"""Small programs that fail the way real ones did, each with the twin repaired by following the printed fix.

A case is a function of ``guard`` and ``repaired``: it builds a model and trains it inside ``with guard(model)``, as it
failed or, where ``repaired`` is 1 or 2, by the first or the second remedy that the finding prints.
Lines it must be blamed for end in a marker comment such as ``# <- raise``.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ampcheck import AmpChecker
from ampcheck.precision import Precision


class Guard(Protocol):
    """Opens the region in which the case may fail. What it does with an exception is the caller's affair.

    ``checker`` is for the host's adapter where the case has one (``None``: it runs without), ``anomaly`` says that the
    host is to run in anomaly mode.
    """

    checker: AmpChecker | None
    anomaly: bool

    def __call__(
        self,
        model: nn.Module | None,
        *,
        precision: Precision = ...,
        optimizers: tuple[Any, ...] = ...,
        scaler: Any = ...,
        averaged: nn.Module | None = ...,
        phase: str = ...,
    ) -> AbstractContextManager[Any]: ...

    def host(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The same around the training loop of a host, whose adapter sees to the rest."""

    def script(self) -> AbstractContextManager[Any]:
        """The same around a whole script, which no host runs."""

    def export(self) -> AbstractContextManager[Callable[..., None]]:
        """The same around an export; gives a function that compares it: ``compare(model, exported, inputs)``."""


Program = Callable[..., None]


@dataclass(frozen=True)
class Case:
    """One failure and what must be said of it.

    ``source`` are the public reports it stands for, ``marks`` maps a site's role to the marker of its line,
    ``evidence`` are facts that must be among the finding's, ``also`` are codes of further findings that belong to it,
    ``needs`` are packages beside torch, ``fails`` says of a torch version whether the case can fail there, ``trains``
    is false for a program that takes no optimizer step.
    """

    id: str
    program: Program
    code: str | None
    family: str
    host: str = "plain"
    source: tuple[str, ...] = ()
    module: str | None = None
    marks: Mapping[str, str] = field(default_factory=lambda: {"raise": "raise"})
    operands: Mapping[str, str] | None = None
    reason: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    crashes: bool = True
    trains: bool = True
    remedies: int = 1
    needs: tuple[str, ...] = ()
    fails: Callable[[], bool] = lambda: True

    def run(self, guard: Guard, *, repaired: int = 0) -> None:
        """Run it as it failed, or as repaired by the first or second remedy."""
        self.program(guard, repaired)

    @property
    def file(self) -> str:
        return inspect.getsourcefile(self.program) or ""

    def line(self, marker: str) -> int:
        """Line number of ``# <- marker`` in the case's program or in what its file defines for it."""
        lines, first = inspect.getsourcelines(self.program)
        found = [first + i for i, text in enumerate(lines) if text.rstrip().endswith(f"# <- {marker}")]
        if not found:
            text = Path(self.file).read_text(encoding="utf-8").splitlines()
            found = [i for i, line in enumerate(text, 1) if line.rstrip().endswith(f"# <- {self.id}: {marker}")]
        assert len(found) == 1, f"{self.id}: {len(found)} lines are marked {marker!r}"
        return found[0]


@dataclass(frozen=True)
class Script(Case):
    """A whole script, as people write them, in a file of its own.

    Its twin is in it, too: without each line that a comment ``# -`` follows, and with the lines after ``# +``.
    """

    path: Path = Path()

    def run(self, guard: Guard, *, repaired: int = 0) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = self.path
            if repaired:
                path = Path(directory, self.path.name)
                path.write_text("\n".join(self._repaired()), encoding="utf-8")
            name = f"script_{self.path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            try:
                with guard.script():
                    spec.loader.exec_module(module)
            finally:
                del sys.modules[name]

    def _repaired(self) -> Iterator[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            indent, mark, code = re.fullmatch(r"(\s*)(# [-+](?= |$) ?)?(.*)", line).groups()  # type: ignore[union-attr]
            if mark is None and following.strip() != "# -":
                yield line
            elif mark is not None and "+" in mark:
                yield indent + code

    @property
    def file(self) -> str:
        return str(self.path)

    def line(self, marker: str) -> int:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if marker in line.partition("# <- ")[2].split(", ")]
        assert len(found) == 1, f"{self.id}: {len(found)} lines are marked {marker!r}"
        return found[0]


class Cases(list[Case]):
    """The cases of one file, filled by its decorator. ``expected`` holds for all of them that say nothing else."""

    def __init__(self, **expected: Any) -> None:
        super().__init__()
        self.expected = expected

    def case(self, id: str, code: str | None, **expected: Any) -> Callable[[Program], Program]:
        def add(program: Program) -> Program:
            self.append(Case(id, program, code, **{**self.expected, **expected}))
            return program

        return add
