"""A fit under Lightning, for faults to be thrown into."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from injection import Program, held

# What stands in the place of the host's own methods.
CONTAINS: tuple[str, ...] = ()


def run(dies: bool) -> Program:
    lightning = pytest.importorskip("lightning.pytorch")
    from hosts import lightning_digits as digits

    from ampcheck.integrations.lightning import AmpCheck

    def program(arm: Any, told: Any, models: list[Any]) -> Any:
        module = digits.digits_module(lightning, training=digits.misspelled if dies else contextlib.nullcontext)
        models.append(module)
        callbacks = [AmpCheck(ignore="AMP107")] if told is not None else []
        trainer = digits.trainer(lightning, *callbacks, precision="bf16-mixed", num_sanity_val_steps=0)
        with arm():
            trainer.fit(module, digits.loader(count=32), digits.loader("val", 16))
        return held(module, module.losses)

    return program
