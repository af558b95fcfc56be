"""What the ranks of a distributed run tell each other: through the rendezvous store, never by a collective."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ampcheck.rule import Finding


def rank() -> int:
    """This process's global rank; 0 where nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    # Before the process group is there and after it is gone, the launcher's word.
    launched_as = os.environ.get("RANK", "")
    return int(launched_as) if launched_as.isdecimal() else 0


def gather(stage: str, mine: Any, patience: timedelta = timedelta(seconds=5)) -> dict[int, Any]:
    """What each rank sent when it last came to ``stage``, by rank, on rank 0; ``{}`` elsewhere.

    A collective would hang, or break the job's own, as soon as one rank has died. Keys in the job's rendezvous store
    cost the senders a write and never wait; rank 0 waits ``patience`` for all and then goes on without the rest.
    """
    me = rank()
    store = _store()
    if store is None:
        return {me: mine} if me == 0 else {}
    # Every rank counts in the store how often it came to the stage, so that a second run is not taken for the first.
    key = f"ampcheck/{stage}/{store.add(f'ampcheck/{stage}/{me}', 1)}"
    if me != 0:
        store.set(f"{key}/{me}", pickle.dumps(mine))
        return {}
    gathered = {0: mine}
    missing = set(range(1, dist.get_world_size()))
    deadline = time.monotonic() + patience.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{key}/{other}"]):
                gathered[other] = pickle.loads(store.get(f"{key}/{other}"))
        missing -= gathered.keys()
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return gathered


def merged_findings(gathered: Mapping[int, tuple[Finding, ...]]) -> tuple[Finding, ...]:
    """The findings of all ranks, each once; one that rank 0 has not says which ranks have it."""
    seen: list[tuple[Finding, list[int]]] = []
    for number, findings in sorted(gathered.items()):
        for finding in findings:
            ranks = next((ranks for other, ranks in seen if other == finding), None)
            if ranks is None:
                seen.append((finding, [number]))
            else:
                ranks.append(number)
    merged = (
        finding if 0 in ranks else replace(finding, message=f"{finding.message} (seen on {_named(ranks)} only)")
        for finding, ranks in seen
    )
    return tuple(sorted(merged, key=lambda finding: (-finding.severity, finding.code)))


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _store() -> Any:
    """The default process group's store, or ``None`` where there is one process or torch does not show it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return find() if find else None
