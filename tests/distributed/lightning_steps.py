"""A fit on scikit-learn's digits with Lightning's `ddp` on two processes, of which the second enters no autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import lightning.pytorch as package
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning_digits import digits_module, loader, trainer

from ampcheck.integrations.lightning import AmpCheck


class ForgetfulOnRank1(MixedPrecision):
    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        forgets = torch.distributed.get_rank() == 1
        with contextlib.nullcontext() if forgets else super().forward_context():
            yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    plugin = ForgetfulOnRank1("bf16-mixed", "cpu")
    run = trainer(package, AmpCheck(ignore="AMP107"), strategy="ddp", devices=2, plugins=[plugin])
    run.fit(digits_module(package), loader(count=32))
    print(f"trained on rank {run.global_rank}")
