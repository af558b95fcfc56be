"""Trains sharded models on scikit-learn's digits, each under AmpCheck: ``torchrun ... sharded_steps.py RESULTS``.

RESULTS gets, as JSON by case: the report's findings, what was said, what was raised, the collectives that the steps
called, and the loss of the last step in hexadecimal digits. A case whose name begins with ``bare-`` runs without
AmpCheck.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F

import ampcheck

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
NO_CASTS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
BACK_TO_FLOAT32 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
FLOAT32 = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
NONE = MixedPrecisionPolicy()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.fc = nn.Linear(64, 64)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.fc(self.norm(x)))


class OwnCasts(Block):
    """A block that is meant to run in float32, whatever it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


class Overwriting(Block):
    """Writes to what the activation has saved for backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.fc(x))
        hidden.mul_(2)
        return x + hidden


class Net(nn.Module):
    def __init__(self, second: type[Block] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Block(), second()])
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharded(
    root: MixedPrecisionPolicy = BFLOAT16,
    block: MixedPrecisionPolicy = BFLOAT16,
    last: MixedPrecisionPolicy | None = None,
    second: type[Block] = Block,
) -> nn.Module:
    """``fully_shard`` on each block and on the whole; ``last`` is the policy of the second block."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Net(second)
    for each, policy in zip(model.blocks, (block, last or block), strict=True):
        fully_shard(each, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=root)


def sharded_layers() -> nn.Module:
    """``fully_shard`` on the layers themselves."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=mesh, mp_policy=BFLOAT16)
    return fully_shard(model, mesh=mesh, mp_policy=BFLOAT16)


def wrapped(original: bool) -> nn.Module:
    """The same by the wrapper that came before ``fully_shard``."""
    return FullyShardedDataParallel(
        Net(),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        device_id=torch.device("cpu"),
        use_orig_params=original,
    )


def half_region() -> Any:
    return torch.autocast("cpu", dtype=torch.float16)


def bfloat16_region() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "policy": (sharded, contextlib.nullcontext),
    "bare-policy": (sharded, contextlib.nullcontext),
    "layers": (sharded_layers, contextlib.nullcontext),
    "float32": (functools.partial(sharded, NONE, NONE), contextlib.nullcontext),
    "float32-block": (functools.partial(sharded, last=FLOAT32, second=OwnCasts), contextlib.nullcontext),
    "autocast": (functools.partial(sharded, NONE, NONE), bfloat16_region),
    "autocast-and-policy": (sharded, bfloat16_region),
    "wrapper": (functools.partial(wrapped, True), contextlib.nullcontext),
    "flat-wrapper": (functools.partial(wrapped, False), contextlib.nullcontext),
    "root-without": (functools.partial(sharded, NONE, BACK_TO_FLOAT32), contextlib.nullcontext),
    "block-without": (functools.partial(sharded, last=NONE, second=OwnCasts), contextlib.nullcontext),
    "other-autocast": (sharded, half_region),
    "block-without-dies": (functools.partial(sharded, last=NONE), contextlib.nullcontext),
    "inputs-not-cast": (functools.partial(sharded, NO_CASTS), contextlib.nullcontext),
    "overwritten": (functools.partial(sharded, second=Overwriting), contextlib.nullcontext),
}


def run(name: str, model: nn.Module, region: Callable[[], Any]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = digits("train", 16)
    checker = ampcheck.AmpChecker(ignore="AMP107", report=False)
    said, raised, loss = io.StringIO(), "", torch.zeros(())
    before = dist.group.WORLD._get_sequence_number_for_group()
    bare = name.startswith("bare-")
    try:
        watch = contextlib.nullcontext() if bare else ampcheck.watch(model, optimizer=optimizer, checker=checker)
        with contextlib.redirect_stderr(said), watch:
            for _ in range(3):
                with region():
                    loss = F.cross_entropy(model(images).float(), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError:
        raised = traceback.format_exc()
    report = checker.report
    return {
        "findings": report.to_dict()["findings"] if report else [],
        "precision": str(report.trace.precision) if report else "",
        "said": said.getvalue(),
        "raised": raised,
        "collectives": dist.group.WORLD._get_sequence_number_for_group() - before,
        "loss": loss.item().hex(),
    }


def main(results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, (build, region) in CASES.items():
        torch.manual_seed(0)
        found[name] = run(name, build(), region)
    Path(f"{results}.{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
