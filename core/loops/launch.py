"""Run a script or a module as ``python`` would, so that it cannot tell the difference."""

from __future__ import annotations
import __future__

import ast
import builtins
import functools
import importlib.util
import operator
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from ampcheck.source.lines import is_ours


def run_script(path: str, args: Sequence[str], *, before_main: Callable[[ModuleType], None] | None = None) -> None:
    """Run the file ``path`` as ``__main__`` with ``args``. What it raises passes through.

    ``before_main`` is called once, with the new ``__main__`` module: when everything above the script's
    ``if __name__ == "__main__":`` has run or, if it has none, before anything has. Raises ``OSError`` for a file that
    cannot be read.
    """
    source = Path(path).read_bytes()
    sys.argv = [path, *args]
    path = os.path.abspath(path)
    main = ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __builtins__=builtins, __cached__=None, __loader__=loader, __annotations__={})
    sys.modules["__main__"] = main
    sys.path[0] = str(Path(path).resolve().parent)
    whole = ast.parse(source, path)
    guard = next((i for i, node in enumerate(whole.body) if _is_main_guard(node)), 0)
    flags = 0
    if before_main is not None:
        top = _compiled(ast.Module(whole.body[:guard], []), path)
        exec(top, main.__dict__)
        before_main(main)
        flags = top.co_flags
        whole.body = whole.body[guard:]
    exec(_compiled(whole, path, flags), main.__dict__)


def module_exists(name: str) -> bool:
    """Whether ``python -m`` would find the module ``name``, or at least its top-level package. Imports nothing."""
    sys.path[0] = str(Path.cwd())
    package = name.partition(".")[0]
    return bool(package) and importlib.util.find_spec(package) is not None


def run_module(name: str, args: Sequence[str]) -> None:
    """Run the module ``name`` as ``python -m`` would. What it raises passes through; ``ImportError`` if not found."""
    sys.argv = [name, *args]
    sys.path[0] = str(Path.cwd())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def show_exception(error: BaseException) -> None:
    """Pass ``error`` to the excepthook as the interpreter does, without the frames that ran the program.

    It leaves out AmpCheck's frames in between too, and does the same in the exceptions that ``error`` came from.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            # A syntax error in the script itself has no frame of its own.
            each.__traceback__ = _of_the_program(each.__traceback__)
            pending += [each.__cause__, each.__context__]
    sys.excepthook(type(error), error, error.__traceback__)


def _of_the_program(traceback: TracebackType | None) -> TracebackType | None:
    entries: list[TracebackType] = []
    while traceback is not None:
        if entries or not _launched(traceback):
            entries.append(traceback)
        traceback = traceback.tb_next
    shown: TracebackType | None = None
    for entry in reversed(entries):
        if not is_ours(entry.tb_frame.f_code.co_filename):
            shown = TracebackType(shown, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return shown


def _launched(traceback: TracebackType) -> bool:
    file = traceback.tb_frame.f_code.co_filename
    return is_ours(file) or file.startswith("<frozen runpy") or file == runpy.__file__


def _is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "__name__ == '__main__'",
        "'__main__' == __name__",
    )


def _compiled(body: ast.Module, path: str, flags: int = 0) -> CodeType:
    code: CodeType = compile(body, path, "exec", flags & _FUTURES, dont_inherit=True)
    return code


# The script's own `from __future__` lines apply to both halves of it.
_FUTURES = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
