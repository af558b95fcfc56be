"""The first evaluation of a plain loop: what is called after ``model.eval()``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn

from ampcheck.checker import AmpChecker
from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.containment import undo
from ampcheck.observe.probes.listening import Listening
from ampcheck.observe.probes.modules import on_module_calls
from ampcheck.observe.step import WatchedStep

Contain = Callable[[Callable[..., None]], Callable[..., None]]


class FirstEvaluation:
    """Watches the first evaluation step of a plain loop.

    Waits for ``eval()`` of a module that is, or holds, one of ``roots()``, and then calls ``began()``. The next call of
    a root in evaluation mode is the watched step, after which nothing is left in place. A hook could not wait without a
    Python call in every batch until then. ``contain`` keeps what is called during training from raising.
    """

    def __init__(
        self,
        checker: AmpChecker,
        roots: Callable[[], tuple[nn.Module, ...]],
        began: Callable[[], None],
        contain: Contain,
    ) -> None:
        self._checker = checker
        self._roots = roots
        self._began = began
        self._contain = contain
        self._held = ExitStack()

    def wait(self) -> None:
        evals = Listening()
        self._held.callback(undo, evals.end)
        evals.to(nn.Module.eval, before=self._contain(self._eval_called))

    def close(self) -> None:
        """Stop waiting and watching."""
        self._held.close()

    def _eval_called(self, module: nn.Module) -> None:
        if not any(part is root for part in module.modules() for root in self._roots()):
            return
        self._began()
        self.close()
        if self._checker.watching_evaluation:
            self._watch()

    def _watch(self) -> None:
        roots = self._roots()
        watched: nn.Module | None = None
        step: AbstractContextManager[object] | None = None

        def before(called: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal watched, step
            if watched is not None or not any(called is root for root in roots):
                return
            if called.training:
                self.close()
                self.wait()
                return
            watched, step = called, self._checker.evaluation_step(autocast=autocast)
            if isinstance(step, WatchedStep):
                step.__enter__()

        def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if step is not None and called is watched:
                self.close()
                step.__exit__(None, None, None)

        autocast = self._held.enter_context(AutocastProbe())
        self._held.callback(undo, on_module_calls(self._contain(before), self._contain(after)))
