"""The first evaluation of a plain loop: what is called after ``model.eval()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
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

    Waits for ``eval()`` of a module that is, or holds, one of ``roots()`` or a copy of one, and then calls ``began()``.
    The next call of such a module in evaluation mode is the watched step, after which nothing is left in place. A hook
    could not wait without a Python call in every batch until then. ``contain`` keeps what is called during training
    from raising.
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
        roots = self._roots()
        if not any(part is root for part in module.modules() for root in roots) and _copied(module, roots) is None:
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
            if watched is not None:
                return
            copy = None if any(called is root for root in roots) else _copied(called, roots)
            if copy is None and not any(called is root for root in roots):
                return
            if called.training:
                if copy is None:
                    self.close()
                    self.wait()
                return
            if copy is not None and any(_is_averaged(copy, root) for root in roots if type(root) is type(copy)):
                self._checker.averaged_by(copy)
            watched, step = called, self._checker.evaluation_step(copy, autocast)
            if isinstance(step, WatchedStep):
                step.__enter__()

        def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if step is not None and called is watched:
                self.close()
                step.__exit__(None, None, None)

        autocast = self._held.enter_context(AutocastProbe())
        self._held.callback(undo, on_module_calls(self._contain(before), self._contain(after)))


def _copied(module: nn.Module, roots: Iterable[nn.Module]) -> nn.Module | None:
    """The copy of a root that ``module`` is or, as an average of weights does, holds."""
    for part in (module, *module.children()):
        for root in roots:
            if part is not root and type(part) is type(root) and _form(part) == _form(root):
                return part
    return None


def _is_averaged(copy: nn.Module, model: nn.Module) -> bool:
    """Whether a copy was written to again and again, and is not just the model in another dtype."""
    for own, other in zip(copy.parameters(), model.parameters(), strict=False):
        rewritten = not own.is_inference() and own._version > 1
        if rewritten and own.shape == other.shape and own.device == other.device:
            return not torch.equal(own.detach(), other.detach().to(own.dtype))
    return False


def _form(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
