"""Starts programs of this folder on several processes over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 200
"""Seconds after which a launch counts as hanging."""


def launched(program: Path | str, *args: str, cwd: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """``torchrun --nproc-per-node PROCESSES PROGRAM ARGS``; ``-m`` and a module's name may stand for the program.

    Raises ``subprocess.TimeoutExpired`` where it hangs.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return python(*torchrun, str(program), *args, cwd=cwd)


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The interpreter that runs the tests, in ``cwd``."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    paths = os.pathsep.join([*map(str, (HERE, HERE.parent, HERE.parent / "hosts")), *inherited])
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
