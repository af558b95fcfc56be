"""The functions of a train script of timm's kind, for faults to be thrown into."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest
import torch
from injection import Program, held

from ampcheck import AmpChecker

# What stands in the place of the host's own methods.
CONTAINS: tuple[str, ...] = (
    *("_Script.train", "_Script.validate", "_Returned.__call__"),
    *("_Updates._around_step", "_Updates._around_zero_grad"),
)


def run(dies: bool) -> Program:
    pytest.importorskip("timm")
    from hosts.test_timm import Fork

    from ampcheck.integrations.timm import install

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        fork = Fork()
        models.append(fork.model)
        script = type(sys)("fork")
        script.train_one_epoch, script.validate = fork.train_one_epoch, fork.validate
        checker = AmpChecker(report=False, ignore="AMP107")
        if told is not None:
            install(script, checker=checker)
        options = {
            "amp_autocast": partial(torch.autocast, device_type="cpu", dtype=torch.float16),
            "loss_scaler": fork.scaler,
        }
        images = torch.ones(2, 3, 32, 32)
        batches = [images] * 2 + ([images.double()] if dies else [])
        try:
            with arm():
                script.train_one_epoch(0, fork.model, batches, opt=fork.optimizer, **options)
                script.validate(fork.model, [images], options["amp_autocast"])
        finally:
            checker.detach()
        return held(fork.model)

    return program
