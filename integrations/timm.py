"""AmpCheck around timm's train script, unmodified:

    python -m ampcheck.integrations.timm [--json FILE] [--fail-on error] train.py --amp --amp-dtype bfloat16 ...
    torchrun --nproc-per-node 2 -m ampcheck.integrations.timm train.py ...

or, in a fork of it, one line before its last: ``ampcheck.integrations.timm.install()``.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import functools
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import FrameType, MethodType, ModuleType, TracebackType
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import timm
import torch
from torch import nn

from ampcheck import AmpChecker, FindingsError, Host, Precision, run_script, show_exception, unwrapped, watch
from ampcheck.integrations.fixes.timm import FIXES

__all__ = ["FIXES", "install"]

_DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "half": "float16"}
_FLAGS = ("--amp", "--native-amp", "--apex-amp", "--amp-impl", "--amp-dtype", "--model-dtype")
_LOGGER = logging.getLogger("train")


def install(
    script: ModuleType | None = None,
    *,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    fail_on: str = "never",
    watch_steps: int = 1,
    report: bool | str | os.PathLike[str] = True,
    checker: AmpChecker | None = None,
) -> AmpChecker:
    """Check the training that ``script`` (default: the program that runs) does in its functions ``train_one_epoch``
    and ``validate``. To be called once both are defined, before they are used.

    Reports go to the script's logger, ``train``, and as ``ampcheck.json`` into its output directory.

    ``select`` and ``ignore`` take rule codes or prefixes (``"AMP2"``). ``fail_on`` (``"error"``, ``"warning"`` or
    ``"never"``) stops training on a finding that severe. ``watch_steps`` is the number of updates to watch. ``report``
    is the path of the JSON report, or false for none. ``checker`` replaces all of these.

    Raises ``ValueError`` for an unknown code or option value, and for options given beside ``checker``.
    """
    options = {"select": select, "ignore": ignore, "fail_on": fail_on, "watch_steps": watch_steps, "report": report}
    given = [name for name, value in options.items() if value != (install.__kwdefaults__ or {})[name]]
    if checker is not None and given:
        raise ValueError(f"install takes {', '.join(given)} or a checker, not both")
    checker = checker or AmpChecker(**options)  # type: ignore[arg-type]
    script = script or sys.modules["__main__"]
    if not _Script(checker).wrap(vars(script)):
        _say(f"ampcheck  {script.__name__} defines no train_one_epoch() so far, and is not checked")
    atexit.register(checker.detach)
    return checker


class _Guest:
    """What is called from within the training. A method made by ``_contained`` raises nothing into it but the
    ``FindingsError`` that was asked for."""

    _checker: AmpChecker

    def _take_back(self) -> None:
        """After a fault: leave the script's objects as they were."""


S = TypeVar("S", bound=_Guest)
P = ParamSpec("P")
R = TypeVar("R")


def _contained(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R | None]:
    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R | None:
        try:
            return method(self, *args, **kwargs)
        except FindingsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is ours and not the script's
            with suppress(Exception):
                self._take_back()
            self._checker.switch_off(error, emit=_say)
            return None

    return call


class _Script(_Guest):
    """The two functions of a train script, with the checker around each call."""

    def __init__(self, checker: AmpChecker) -> None:
        self._checker = checker
        self._attached = False

    def _take_back(self) -> None:
        self._attached = True

    def wrap(self, namespace: dict[str, Any]) -> bool:
        """Wrap the functions by name; false, and nothing is done, where there is none that trains."""
        if not callable(namespace.get("train_one_epoch")):
            return False
        for name, wrapper in (("train_one_epoch", self._train), ("validate", self._validate)):
            function = namespace.get(name)
            if callable(function):
                namespace[name] = functools.update_wrapper(functools.partial(wrapper, function), function)
        return True

    def _train(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        updates = self._updates(function, args, kwargs)
        try:
            with updates or nullcontext():
                return function(*args, **kwargs)
        except Exception as error:
            batch = None
            # What the frames alone tell is worth more than nothing.
            with suppress(Exception):
                batch = _failing_batch(frame for frame, _ in traceback.walk_tb(error.__traceback__))
            self._checker.diagnose(error, phase="training_step", batch=batch)
            raise

    def _validate(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        forward = self._first_forward(function, args, kwargs)
        try:
            with forward or nullcontext():
                return function(*args, **kwargs)
        except Exception as error:
            self._checker.diagnose(error, phase="evaluation_step")
            raise

    @_contained
    def _updates(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Updates:
        values = _arguments(function, args, kwargs)
        if not self._attached:
            self._attached = True
            self._attach(values)
        return _Updates(self._checker, _optimizer(values))

    @_contained
    def _first_forward(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _FirstForward:
        values = _arguments(function, args, kwargs)
        if not self._attached and self._checker.report is None:
            self._attach(values)
        return _FirstForward(self._checker, _model(values))

    def _attach(self, values: Mapping[str, Any]) -> None:
        model = _model(values)
        if model is None:
            _say("ampcheck  the script's functions are given no model: nothing is checked")
            return
        scaler = getattr(values.get("loss_scaler"), "_scaler", values.get("loss_scaler"))
        scaler = scaler if isinstance(scaler, torch.amp.GradScaler) else None
        optimizer = _optimizer(values)
        self._checker.attach(
            model,
            precision=_declared(values, model, scaler),
            optimizers=[] if optimizer is None else [optimizer],
            scaler=scaler,
            averaged=_averaged(values),
            host=Host("timm", timm.__version__, FIXES),
            emit=_say,
            directory=values.get("output_dir"),
        )


class _Updates(_Guest):
    """Watches updates, from here or the end of the one before, while the checker has steps left to watch.

    A script of timm's kind has no event between two batches, so two methods of its optimizer are wrapped until then.
    An update is over when ``step`` returns, or when ``zero_grad`` finds gradients: then the scaler skipped it.
    """

    def __init__(self, checker: AmpChecker, optimizer: torch.optim.Optimizer | None) -> None:
        self._checker = checker
        self._optimizer = optimizer
        self._before: dict[str, tuple[Any, Any]] = {}
        self._step: AbstractContextManager[object] | None = None

    @_contained
    def __enter__(self) -> None:
        if self._checker.watching:
            if self._optimizer is not None:
                self._wrap(self._optimizer, "step", lambda: True)
                self._wrap(self._optimizer, "zero_grad", self._has_gradients)
            self._open()

    @_contained
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._take_back()
        self._close(exc)

    def _open(self) -> None:
        self._step = self._checker.training_step(batch=_failing_batch)
        self._step.__enter__()

    def _close(self, error: BaseException | None = None) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    @_contained
    def _updated(self) -> None:
        self._close()
        if self._checker.watching:
            self._open()
        else:
            self._take_back()

    @_contained
    def _has_gradients(self) -> bool:
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

    def _wrap(self, optimizer: torch.optim.Optimizer, name: str, ends: Callable[[], bool | None]) -> None:
        method = getattr(optimizer, name)

        @functools.wraps(method)
        def wrapper(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            over = ends()
            result = method(*args, **kwargs)
            if over:
                self._updated()
            return result

        # A bound method, because learning rate schedulers take `step` apart.
        ours = MethodType(wrapper, optimizer)
        self._before[name] = ours, vars(optimizer).get(name)
        setattr(optimizer, name, ours)

    def _take_back(self) -> None:
        own = vars(self._optimizer) if self._optimizer is not None else {}
        for name, (ours, before) in self._before.items():
            if own.get(name) is not ours:
                continue
            if before is None:
                del own[name]
            else:
                own[name] = before
        self._before.clear()


class _FirstForward(_Guest):
    """Watches evaluation until the first call of ``model`` has returned."""

    def __init__(self, checker: AmpChecker, model: nn.Module | None) -> None:
        self._checker = checker
        self._model = model
        self._open = ExitStack()

    @_contained
    def __enter__(self) -> None:
        scripted = isinstance(self._model, torch.jit.ScriptModule)  # takes no hooks
        if self._model is not None and not scripted and self._checker.watching_evaluation:
            handle = self._model.register_forward_hook(_Returned(self))
            self._open.callback(handle.remove)
            self._open.enter_context(self._checker.evaluation_step(self._model))

    @_contained
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(exc_type, exc, traceback)

    def _take_back(self) -> None:
        self._open.close()

    @_contained
    def returned(self) -> None:
        self._open.close()


class _Returned:
    """The hook as the module holds it: a copy or a pickle of the module gets one that does nothing."""

    def __init__(self, watch: _FirstForward) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._watch.returned()

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _failing_batch(frames: Iterable[FrameType]) -> Callable[[], object] | None:
    """Computes the loss of the batch in these frames as the script does, with what the frame of its loop holds;
    ``None`` where that is not what timm's scripts have."""
    held = (frame.f_locals for frame in frames)
    values: dict[str, Any] = next(
        (dict(found) for found in held if {"input", "target", "amp_autocast"} <= {*found}), {}
    )
    named: Iterator[Any] = (values.get(name) for name in ("amp_autocast", "task", "model", "loss_fn"))
    amp_autocast, task, model, loss_fn = named
    if not callable(amp_autocast):
        return None

    def by_task() -> object:
        with amp_autocast():
            return _alone(task)(values["input"], values["target"])["loss"]

    def by_model() -> object:
        with amp_autocast():
            return loss_fn(unwrapped(model)(values["input"]), values["target"])

    if isinstance(task, nn.Module):
        return by_task
    return by_model if isinstance(model, nn.Module) and callable(loss_fn) else None


def _alone(task: nn.Module) -> nn.Module:
    """The task around the modules in its wrappers."""
    alone = copy.copy(task)
    alone._modules = {name: child if child is None else unwrapped(child) for name, child in task._modules.items()}
    return alone


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return kwargs
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            values[name] = value
    return values


def _model(values: Mapping[str, Any]) -> nn.Module | None:
    named = (values.get("model"), values.get("task"))
    return next((value for value in (*named, *values.values()) if isinstance(value, nn.Module)), None)


def _optimizer(values: Mapping[str, Any]) -> torch.optim.Optimizer | None:
    return next((value for value in values.values() if isinstance(value, torch.optim.Optimizer)), None)


def _averaged(values: Mapping[str, Any]) -> nn.Module | None:
    """The module inside one of timm's ``ModelEma`` classes."""
    holder = values.get("model_ema") or getattr(values.get("task"), "trainable_module_ema", None)
    copy = getattr(holder, "module", None) or getattr(holder, "ema", None)
    return copy if isinstance(copy, nn.Module) else None


def _declared(values: Mapping[str, Any], model: nn.Module, scaler: torch.amp.GradScaler | None) -> Precision:
    """What the command line asks for; where it has no say, what the script hands to its function."""
    args, flags = values.get("args"), _given_flags(sys.argv[1:])
    # Not from `device`, which timm 0.9 does not hand on.
    device_type = next((parameter.device.type for parameter in model.parameters()), None)
    source = " ".join(f"{flag} {value}" if value else flag for flag, value in flags.items())
    if getattr(args, "amp_impl", None) == "apex" or "--apex-amp" in flags:
        return Precision(device_type=device_type, source=source)
    scaling = scaler is not None and scaler.is_enabled()
    regions = _dtype_of_regions(values.get("amp_autocast"))
    if getattr(args, "amp", "--amp" in flags) or getattr(args, "native_amp", False):
        asked = getattr(args, "amp_dtype", None) or flags.get("--amp-dtype")
        dtype = _DTYPES.get(str(asked).removeprefix("torch.")) if asked else regions
        source = source or ", ".join(f"args.{k}={v!r}" for k, v in vars(args).items() if k in ("amp", "amp_dtype"))
        return Precision("mixed", device_type, dtype, scaling, source)
    converted = values.get("model_dtype") or getattr(args, "model_dtype", None)
    if converted:
        dtype = str(converted).removeprefix("torch.")
        return Precision("true", device_type, dtype, source=source or f"model_dtype={dtype}")
    if regions:
        return Precision("mixed", device_type, regions, scaling, "the script's `amp_autocast`")
    if hasattr(args, "amp"):
        return Precision("true", device_type, "float32", source="no --amp", explicit=False)
    return Precision(device_type=device_type)


def _given_flags(argv: Sequence[str]) -> dict[str, str]:
    """The flags of the command line that have to do with precision, with their values."""
    found: dict[str, str] = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        flag, _, value = word.partition("=")
        if flag in _FLAGS:
            found[flag] = value or ("" if following.startswith("-") or flag.endswith("amp") else following)
    return found


def _dtype_of_regions(amp_autocast: Any) -> str | None:
    """The dtype of the autocast regions that ``amp_autocast()`` makes; ``None`` where it makes none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            region = amp_autocast()
    except Exception:  # noqa: BLE001 - the script will call it in its turn
        return None
    if not isinstance(region, torch.autocast) or not region._enabled:
        return None
    return str(region.fast_dtype).removeprefix("torch.")


def _say(text: str) -> None:
    """To the script's logger, or where it has been given no handler, to standard error."""
    _LOGGER.log(logging.INFO if _LOGGER.hasHandlers() and _LOGGER.isEnabledFor(logging.INFO) else logging.WARNING, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a train script under the checker. Options of AmpCheck come before the script; all that follows is its own.

    The exit status is the script's, 3 where a finding reaches ``--fail-on``, or 2 for bad options.
    """
    parser = _Parser(
        prog="python -m ampcheck.integrations.timm",
        description="Run timm's train script, or a fork of it, unmodified, and check its mixed precision.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report to FILE as JSON")
    parser.add_argument("--watch-steps", metavar="N", type=int, default=1, help="how many updates to watch")
    parser.add_argument("--fail-on", default="never", help="stop with status 3 on a finding: error, warning or never")
    parser.add_argument("--select", metavar="CODES", default="", help="judge only these rules: AMP101,AMP2,...")
    parser.add_argument("--ignore", metavar="CODES", default="", help="do not judge these rules")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    script, report = options.script, options.json
    try:
        checker = AmpChecker(
            select=options.select,
            ignore=options.ignore,
            fail_on=options.fail_on,
            watch_steps=options.watch_steps,
            report=report or True,
        )
    except ValueError as error:
        parser.error(str(error))
    if report and (report.is_dir() or not os.access(report.absolute().parent, os.W_OK)):
        parser.error(f"the report cannot be written to {str(report)!r}")
    if not os.path.isfile(script):
        parser.error(f"there is no script {script!r}")
    try:
        _run(script, options.args, checker)
    except FindingsError as error:
        parser.exit(3, f"ampcheck  stopped by --fail-on: {error}\n")
    except Exception as error:  # noqa: BLE001 - it is the script's, shown as the script's
        checker.diagnose(error, phase="script")
        show_exception(error)
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _run(path: str, args: Sequence[str], checker: AmpChecker) -> None:
    """Run the script. One that is not of timm's kind is watched as any script is."""
    script = _Script(checker)
    with ExitStack() as watched:

        def watch_anything() -> None:
            _say(f"ampcheck  {path} has no train_one_epoch() and a main guard: watched as by `ampcheck run`")
            watched.enter_context(watch(None, checker=checker))

        def before_main(main: ModuleType) -> None:
            if not script.wrap(vars(main)):
                watch_anything()

        watched.callback(checker.detach)
        if b"__main__" not in Path(path).read_bytes():
            watch_anything()
        run_script(path, args, before_main=before_main)


if __name__ == "__main__":
    main()
