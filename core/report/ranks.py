"""What the ranks of a distributed run exchange, through the rendezvous store and never by a collective."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ampcheck.rules.rule import Finding


def rank() -> int:
    """This process's global rank; 0 if nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    # Before the process group exists and after it is gone, trust the launcher.
    launched_as = os.environ.get("RANK", "")
    return int(launched_as) if launched_as.isdecimal() else 0


def world_size() -> int:
    """The number of ranks; 1 if nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(stage: str, mine: Any, patience: timedelta = timedelta(seconds=5)) -> dict[int, Any]:
    """What each rank sent when it last reached ``stage``, by rank, on rank 0; ``{}`` elsewhere.

    A collective would hang, or break the job's own, as soon as one rank has died. Keys in the job's rendezvous store
    cost the senders one write and no waiting; rank 0 waits ``patience`` for all and then goes on without the rest.
    """
    me = rank()
    store = _store()
    if store is None:
        return {me: mine} if me == 0 else {}
    # Each rank counts its visits to the stage in the store, so that a second run is not taken for the first.
    key = f"ampcheck/{stage}/{store.add(f'ampcheck/{stage}/{me}', 1)}"
    if me != 0:
        store.set(f"{key}/{me}", pickle.dumps(mine))
        return {}
    gathered = {0: mine}
    missing = set(range(1, world_size()))
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


def merged_findings(
    findings: Mapping[int, tuple[Finding, ...]], heard: Collection[int]
) -> tuple[tuple[Finding, Finding], ...]:
    """The ``findings`` that each rank sent last, each once: as it was sent, and as it is reported.

    If a rank ``heard`` now lacks a finding, its message says who has it and, if all ranks are known, that no others do.
    """
    seen: list[tuple[Finding, set[int]]] = []
    for number, of_rank in sorted(findings.items()):
        for finding in of_rank:
            ranks = next((ranks for other, ranks in seen if other == finding), None)
            if ranks is None:
                seen.append((finding, {number}))
            else:
                ranks.add(number)
    merged = ((finding, _told(finding, ranks, set(heard))) for finding, ranks in seen)
    return tuple(sorted(merged, key=lambda pair: (-pair[0].severity, pair[0].code)))


def _told(finding: Finding, ranks: set[int], heard: set[int]) -> Finding:
    if heard <= ranks:
        return finding
    only = " only" if len(ranks | heard) == world_size() else ""
    return replace(finding, message=f"{finding.message} (seen on {_named(sorted(ranks))}{only})")


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _store() -> Any:
    """The default process group's store; ``None`` for a single process, or if torch does not show it."""
    if world_size() == 1:
        return None
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return find() if find else None
