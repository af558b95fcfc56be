"""Starts programs on several ranks, as `torchrun` does, in forks of a process that has imported PyTorch once:

    ranks.py PROCESSES '{"NAME": ["SCRIPT", "ARG", ...], "OTHER": ["-m", "MODULE", ...]}'

Each launch runs in a directory of its name. What its ranks print goes to the files ``out.RANK`` and ``err.RANK``
there. Prints the exit statuses of all ranks by name; -9 stands for one that hung after another had failed.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import time

import torch
import torch._dynamo
import torch.distributed
from digits import digits

import ampcheck.cli
import ampcheck.loops.script  # noqa: F401

PATIENCE = 30.0


def interpret(command: list[str], rank: int) -> int:
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stream}.{rank}", os.O_WRONLY | os.O_CREAT), number)
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy._run_module_as_main(command[1])
        else:
            sys.argv = command
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


def launch(processes: int, command: list[str]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(interpret(command, rank))
        children.append(child)
    statuses: dict[int, int] = {}
    failed = None
    while len(statuses) < processes:
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if statuses[child] else None)
            elif failed is not None and time.monotonic() - failed > PATIENCE:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits("train", 4)
    home = os.getcwd()
    results = {}
    for name, command in json.loads(sys.argv[2]).items():
        os.makedirs(name)
        os.chdir(name)
        results[name] = launch(int(sys.argv[1]), command)
        os.chdir(home)
    print(json.dumps(results))
