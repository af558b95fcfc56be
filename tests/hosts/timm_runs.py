"""Runs programs as ``python`` would, in forks of a process that has imported PyTorch and timm once.

Reads one JSON object a line: ``command`` (``["-m", MODULE, ...]`` or ``[SCRIPT, ...]``), ``cwd``, ``env``, and files
for ``stdout`` and ``stderr``. Starts all programs of a line (a list of such objects) at once, and answers with a list
of exit statuses when they have ended.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
from typing import Any

import sklearn.datasets  # noqa: F401
import timm.task  # noqa: F401
import torch


def interpret(command: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> int:
    os.chdir(cwd)
    os.environ.update(env)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path[0] = cwd
            runpy._run_module_as_main(command[1])
        else:
            sys.argv = command
            sys.path[0] = os.path.dirname(os.path.realpath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - this is what the interpreter does
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def start(program: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(interpret(**program))
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        children = [start(program) for program in json.loads(line)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), file=sys.__stdout__, flush=True)
