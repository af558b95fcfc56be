"""Train on two processes over gloo: `torchrun --nproc_per_node=2 mmengine_two_processes.py WORK_DIR FAIL_ON KEY VALUE`.

The second process has the setting KEY=VALUE. MMEngine's own launcher takes a CUDA device for granted, but accepts a
process group that is there already.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner import Runner


def main(work_dir: str, fail_on: str, key: str, value: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = Config.fromfile(Path(__file__).with_name("mmengine_config.py"))
    config.launcher = "pytorch"
    config.work_dir = work_dir
    config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    config.custom_hooks = [{"type": "AmpCheckHook", "fail_on": fail_on, "ignore": "AMP107"}]
    if dist.get_rank() == 1:
        config.merge_from_dict({key: value})
    Runner.from_cfg(config).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
