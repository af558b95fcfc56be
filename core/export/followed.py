"""Follow the exports that a program makes: compare each result with the model it was made from, or say why it died."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from ampcheck.checker import AmpChecker, FindingsError
from ampcheck.export.compare import compared
from ampcheck.export.eager import eager_outputs
from ampcheck.export.failures import export_failure
from ampcheck.export.opened import first_line
from ampcheck.export.values import Inputs
from ampcheck.observe.probes.listening import Listening, nobody_listening
from ampcheck.observe.state import everything_put_back
from ampcheck.observe.walk import is_sharded, unwrapped
from ampcheck.report.ranks import rank, world_size
from ampcheck.report.teller import Emit
from ampcheck.source.lines import callers, calling_site, is_library, is_torch
from ampcheck.trace import Export, Site

# What a comparison may cost: one plain call of the model, all inputs together, and the copies of parameters.
_CALL, _SECONDS, _BYTES = 5.0, 20.0, 2**32
# An exporter with a list of sizes to cover is not compared for every one of them.
_MOST = 3
_EXPORTING = ("export", "torchscript", "onnx")


class _Given(NamedTuple):
    """What an export function was given: the module, its inputs (``None``: there are none), and where the result lies
    if it is not returned. ``evaluated``: it puts the module into evaluation mode."""

    model: nn.Module | ExportedProgram
    inputs: Inputs | None
    file: object = None
    evaluated: bool = False


@dataclass
class _Running:
    """The outermost export of the program that is running, if it is followed."""

    function: str
    given: _Given
    site: Site | None
    autocast: bool
    quiet: AbstractContextManager[None]


_begun: list[weakref.ref[FollowedExports]] = []


class FollowedExports:
    """Follows ``torch.jit.trace``, ``torch.jit.script``, ``torch.export.export`` and ``torch.onnx.export``.

    Right after the outermost of them returns, on a module and called by the program or by a library's own export, the
    result is compared with the module, which is then put back as it was, with the random state. What it raises, or what
    saving a TorchScript module raises, is explained. The checker takes it all into its report.

    Only the process and the thread that ``begin`` are followed. ``fail`` is called with a fault of AmpCheck's own.
    ``emit`` and ``directory`` are those of ``AmpChecker.attach``, for exports before it.
    """

    def __init__(
        self,
        checker: AmpChecker,
        fail: Callable[[Exception], None],
        *,
        emit: Emit | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        self._checker = checker
        self._fail = fail
        self._emit, self._directory = emit, directory
        self._listening = Listening()
        self._running: _Running | None = None
        self._thread = os.getpid(), threading.get_ident()
        # The module that a TorchScript module or a program was made from, as that may be exported in turn.
        self._made_from: weakref.WeakKeyDictionary[Any, tuple[Any, Inputs | None]] = weakref.WeakKeyDictionary()
        self._compared: weakref.WeakKeyDictionary[nn.Module, dict[str, set[Any]]] = weakref.WeakKeyDictionary()

    def begin(self) -> None:
        self._thread = os.getpid(), threading.get_ident()
        _begun.append(weakref.ref(self))
        # Whoever forgets to end a run leaves nothing either.
        weakref.finalize(self, self._listening.end)
        script: Any = torch.jit._script.RecursiveScriptModule
        self._follow("torch.jit.trace", torch.jit.trace, _traced)
        self._follow("torch.jit.trace_module", torch.jit.trace_module, _traced_methods)
        self._follow("torch.jit.script", torch.jit.script, _scripted)
        self._follow("torch.export.export", torch.export.export, _exported)
        self._follow("torch.onnx.export", torch.onnx.export, _to_onnx)
        for name, function in (
            ("torch.jit.save", torch.jit.save),
            ("ScriptModule.save", script.save),
            ("ScriptModule.save_to_buffer", script.save_to_buffer),
        ):
            self._follow(name, function, _saved)

    def give_back(self) -> None:
        """Stop following; may be called again."""
        _begun[:] = [one for one in _begun if one() not in (self, None)]
        self._listening.end()
        self._made_from.clear()
        self._compared.clear()

    def _follow(self, name: str, function: Any, read: Callable[[Mapping[str, Any]], _Given | None]) -> None:
        signature, reference = _signature(function), weakref.ref(self)

        def before(*args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
            me = reference()
            try:
                return me._began(name, lambda: read(_bound(signature, args, kwargs)), args, kwargs) if me else None
            except Exception as error:  # noqa: BLE001
                if me is not None:
                    me._fail(error)
                return None

        def after(result: Any, *args: Any, **kwargs: Any) -> None:
            if (me := reference()) is not None:
                me._ended(lambda running: me._returned(running, result))

        def failed(error: BaseException, *args: Any, **kwargs: Any) -> None:
            if (me := reference()) is not None:
                with contextlib.suppress(FindingsError):
                    me._ended(lambda running: me._raised(running, error), error)

        self._listening.to(function, before=before, after=after, failed=failed)

    def _began(
        self, function: str, read: Callable[[], _Given | None], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        # A host's run inside `ampcheck run` reports its exports itself.
        others = [one for each in _begun if (one := each()) is not None]
        innermost = others[-1:] == [self] and all(one._running is None for one in others)
        if innermost and (os.getpid(), threading.get_ident()) == self._thread and _by_the_program():
            given = read()
            if given is not None:
                called = calling_site(depth=2)
                site = called and replace(called, op=function)
                autocast = any(map(torch.is_autocast_enabled, _device_types(given.model)))
                quiet = nobody_listening()
                quiet.__enter__()
                self._running = _Running(function, given, site, autocast, quiet)
        return _one_frame_deeper(args, kwargs) if function == "torch.jit.script" else None

    def _ended(self, take: Callable[[_Running], Export | None], error: BaseException | None = None) -> None:
        running = self._running
        if running is None or (os.getpid(), threading.get_ident()) != self._thread:
            return
        self._running = None
        try:
            try:
                export = take(running)
            finally:
                running.quiet.__exit__(None, None, None)
            if export is not None:
                self._checker.exported(export, error, emit=self._emit, directory=self._directory)
        except FindingsError:
            raise
        except RecursionError:
            # The program is at the recursion limit: that is not our fault, and need not be its own.
            return
        except Exception as fault:  # noqa: BLE001 - the export has ended, whatever fails here
            self._fail(fault)

    def _raised(self, running: _Running, error: BaseException) -> Export | None:
        if not isinstance(error, Exception):
            return None
        failure = export_failure(running.function, error, autocast=running.autocast)
        return Export(running.function, _name(running.given.model), running.site, failure=failure)

    def _returned(self, running: _Running, result: object) -> Export | None:
        function, given = running.function, running.given
        model, inputs = self._origin(given)
        if isinstance(result, (torch.jit.ScriptModule, ExportedProgram)) and model is not None:
            self._made_from[result] = weakref.ref(model), inputs
        if function in _SAVING or rank() != 0:
            return None
        done = Export(function, _name(given.model if model is None else model), running.site)
        if world_size() > 1:
            # What the module's forward pass sends to other processes, they would take for their own.
            return replace(done, left_out="several processes train, and one of them alone may not run the module")
        if model is None:
            return replace(done, left_out="the module that it was made from is not known")
        # The same export again, of trained weights perhaps, has the same faults.
        form = inputs and _form(inputs), model.training, running.autocast, running.site
        known = self._compared.setdefault(model, {}).setdefault(function, set())
        if form in known or len(known) > _MOST:
            return None
        known.add(form)
        if len(known) > _MOST:
            return replace(done, left_out=f"{_MOST} such exports of it were")
        if inputs is None:
            return replace(done, left_out=f"{function} was given no example inputs")
        why = _too_much(model)
        if why is not None:
            return replace(done, left_out=why)
        try:
            with _undisturbed(model, evaluated=given.evaluated):
                exported = _result(result, given.file)
                seconds = _plain_call(model, inputs)
                if seconds > _CALL:
                    return replace(done, left_out=f"one call of the model takes {seconds:.0f} s")
                comparison = compared(model, exported, inputs, trusted=True, seconds=_SECONDS)
        except (ValueError, OSError) as error:
            return replace(done, left_out=first_line(error))
        except Exception as error:  # noqa: BLE001 - whoever raised it, the run has nothing else to fear from it
            return replace(done, left_out=f"the comparison failed with {type(error).__name__}: {first_line(error)}")
        return replace(done, comparison=comparison)

    def _origin(self, given: _Given) -> tuple[nn.Module | None, Inputs | None]:
        """The module behind what was exported, and the inputs that belong to it."""
        model, inputs = given.model, given.inputs
        if isinstance(model, (torch.jit.ScriptModule, ExportedProgram)):
            made_from, its_inputs = self._made_from.get(model, (lambda: None, None))
            return made_from(), inputs if inputs is not None else its_inputs
        return unwrapped(model), inputs


def _by_the_program() -> bool:
    """Whether the program calls the export itself, or through what a library calls an export."""
    frames = callers(sys._getframe(1))
    first = next(frames, None)
    if first is None or is_torch(first.f_code.co_filename):
        return False
    exporting = through_library = False
    frame: FrameType | None
    for frame in (first, *frames):
        file = frame.f_code.co_filename
        if not is_library(file):
            return exporting or not through_library
        if not is_torch(file):
            through_library = True
            name = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_name}".lower()
            exporting = exporting or any(word in name for word in _EXPORTING)
    return exporting


def _one_frame_deeper(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of ``torch.jit.script`` with which it looks for a class's names in the same frame as before."""
    if not args or not isinstance(args[0], type) or "_frames_up" in kwargs or "optimize" in kwargs:
        return None
    optimize, frames_up = (*args[1:3], None, 0)[:2] if len(args) < 3 else args[1:3]
    return (args[0], optimize, (frames_up or 0) + 1, *args[3:])


_signatures: dict[Any, inspect.Signature] = {}


def _signature(function: Any) -> inspect.Signature:
    """The signature of a function, also while somebody listens to it and its code takes anything."""
    return _signatures.setdefault(function, inspect.signature(function))


def _bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _traced(given: Mapping[str, Any]) -> _Given | None:
    function = given.get("func")
    owner = getattr(function, "__self__", None)
    model = owner if getattr(function, "__name__", None) == "forward" else function
    example, named = given.get("example_inputs"), given.get("example_kwarg_inputs")
    if example is None:
        return _module(model, _inputs((), named))
    # A mapping is one argument.
    return _module(model, _inputs(tuple(example) if isinstance(example, (tuple, list)) else (example,), None))


def _traced_methods(given: Mapping[str, Any]) -> _Given | None:
    methods = given.get("inputs")
    if not isinstance(methods, Mapping) or set(methods) != {"forward"}:
        return None
    return _traced({"func": given.get("mod"), "example_inputs": methods["forward"]})


def _scripted(given: Mapping[str, Any]) -> _Given | None:
    model, examples = given.get("obj"), given.get("example_inputs")
    if isinstance(examples, Mapping):
        examples = examples.get(model) if isinstance(model, nn.Module) else None
    first = next(iter(examples), None) if isinstance(examples, list) else None
    return _module(model, _inputs(tuple(first), None) if isinstance(first, (tuple, list)) else None)


def _exported(given: Mapping[str, Any]) -> _Given | None:
    args = given.get("args")
    args = tuple(args) if isinstance(args, (tuple, list)) else ()
    return _module(given.get("mod"), _inputs(args, given.get("kwargs")))


def _to_onnx(given: Mapping[str, Any]) -> _Given | None:
    args, named = given.get("args"), given.get("kwargs")
    args = tuple(args) if isinstance(args, (tuple, list)) else () if args is None else (args,)
    # Legacy: a mapping at the end holds the arguments by name.
    if not named and args and isinstance(args[-1], dict):
        *args, named = args
    model, dynamo = given.get("model"), bool(given.get("dynamo"))
    if isinstance(model, ExportedProgram) and not args and not named:
        args, named = model.example_inputs or ((), None)
    follows = _module(model, _inputs(tuple(args), named))
    if follows is None:
        return None
    evaluated = not dynamo and given.get("training") is torch.onnx.TrainingMode.EVAL
    return follows._replace(file=given.get("f"), evaluated=evaluated)


def _saved(given: Mapping[str, Any]) -> _Given | None:
    return _module(given.get("m", given.get("self")), None)


def _module(model: object, inputs: Inputs | None) -> _Given | None:
    return _Given(model, inputs) if isinstance(model, (nn.Module, ExportedProgram)) else None


def _inputs(args: tuple[Any, ...], named: Any) -> Inputs | None:
    found = Inputs(args, {str(name): value for name, value in named.items()} if isinstance(named, Mapping) else {})
    return found if found.tensors else None


_SAVING = ("torch.jit.save", "ScriptModule.save", "ScriptModule.save_to_buffer")


def _name(model: object) -> str:
    return getattr(model, "original_name", None) or type(model).__name__


def _form(inputs: Inputs) -> tuple[Any, ...]:
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in inputs.tensors)


def _device_types(model: object) -> set[str]:
    held = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    return {"cpu"} | {tensor.device.type for tensor in held if torch.amp.is_autocast_available(tensor.device.type)}


def _too_much(model: nn.Module) -> str | None:
    if is_sharded(model):
        return "its parameters lie on several ranks"
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return f"its parameters take {size / 2**30:.1f} GB" if size > _BYTES else None


def _result(result: object, file: object) -> object:
    """What to compare with: the result, or the file that was written instead."""
    if result is not None or not isinstance(file, io.BytesIO):
        return file if result is None else result
    try:
        import onnx  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        raise ValueError("onnx is not installed, and without it a model in memory cannot be read") from error
    return SimpleNamespace(model_proto=onnx.load_from_string(file.getvalue()))


def _plain_call(model: nn.Module, inputs: Inputs) -> float:
    """How many seconds one call takes."""
    began = time.monotonic()
    eager_outputs(model, inputs, 0)
    return time.monotonic() - began


@contextlib.contextmanager
def _undisturbed(model: nn.Module, *, evaluated: bool) -> Iterator[None]:
    """Run a model quietly outside the program's autocast regions, and put everything back."""
    with ExitStack() as around:
        around.enter_context(everything_put_back(model, (), None))
        around.enter_context(contextlib.redirect_stdout(io.StringIO()))
        around.enter_context(contextlib.redirect_stderr(io.StringIO()))
        around.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for device_type in _device_types(model):
            around.enter_context(torch.autocast(device_type, enabled=False))
        for module in model.modules() if evaluated else ():
            module.training = False
        yield
