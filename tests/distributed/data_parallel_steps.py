"""Trains on scikit-learn's digits with DistributedDataParallel: ``torchrun ... data_parallel_steps.py WATCH FAULT``.

WATCH is ``watch`` for AmpCheck around the loop, else ``bare``. FAULT is what goes wrong on the ranks above 0:
``none``; ``float32``, they forget autocast; ``float16``, they enter it in another dtype; ``dtype``, rank 1 dies of
operands of two dtypes.
"""

from __future__ import annotations

import contextlib
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from digits import digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ampcheck


def main(watch: str, fault: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = (part[rank::4] for part in digits("train", 64))
    mixed = not (fault == "float32" and rank > 0)
    dtype = torch.float16 if fault == "float16" and rank > 0 else torch.bfloat16
    around = contextlib.nullcontext()
    if watch == "watch":
        precision = ampcheck.Precision("mixed", "cpu", "bfloat16", False, "train.py --amp")
        checker = ampcheck.AmpChecker(ignore="AMP107", report="report.json")
        around = ampcheck.watch(model, optimizer=optimizer, precision=precision, checker=checker)
    loss = torch.zeros(())
    with around:
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=mixed):
                loss = F.cross_entropy(model(images), labels)
            if fault == "dtype" and rank == 1 and step == 1:
                F.linear(images.flatten(1), torch.ones(1, 64, dtype=torch.bfloat16))
            loss.backward()
            optimizer.step()
    number = dist.group.WORLD._get_sequence_number_for_group()
    print(f"rank {rank} loss {loss.item().hex()} collectives {number}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
