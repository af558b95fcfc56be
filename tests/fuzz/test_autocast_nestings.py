"""Random nestings of autocast regions: what the probe says of a module call is what torch says inside of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ampcheck.observe.probes.autocast import AutocastProbe
from ampcheck.observe.probes.modules import ModuleProbe
from ampcheck.observe.walk import dtype_name

DTYPES = (torch.bfloat16, torch.float16, None)
KINDS = ("with", "decorator", "raises", "generator", "clear", "call")


@st.composite
def nestings(draw: st.DrawFn, depth: int = 0) -> list[Any]:
    """A list of regions ``(kind, device, dtype, enabled, cache, inner)`` and of calls."""
    nodes: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(KINDS)) if depth < 4 else "call"
        if kind in ("call", "clear"):
            nodes.append(kind)
            continue
        device = draw(st.sampled_from(("cpu", "cpu", "cuda")))
        dtype, enabled, cache = (
            draw(st.sampled_from(DTYPES)),
            draw(st.booleans()),
            draw(st.sampled_from((True, False, None))),
        )
        nodes.append((kind, device, dtype, enabled, cache, draw(nestings(depth + 1))))
    return nodes


class Looks(nn.Module):
    """Notes what torch says of autocast in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen: list[tuple[bool, str, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.seen.append((enabled, dtype_name(dtype), torch.is_autocast_cache_enabled()))
        return x * self.weight


class Stop(Exception):
    pass


def play(nodes: list[Any], module: nn.Module) -> None:
    for node in nodes:
        if node == "call":
            module(torch.ones(2))
        elif node == "clear":
            torch.clear_autocast_cache()
        else:
            kind, device, dtype, enabled, cache, inner = node
            region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            if kind == "with":
                with region:
                    play(inner, module)
            elif kind == "raises":
                with contextlib.suppress(Stop), region:
                    play(inner, module)
                    raise Stop
            elif kind == "decorator":
                region(play)(inner, module)
            else:
                with contextlib.contextmanager(lambda region=region: (yield region.__enter__()))():
                    play(inner, module)
                region.__exit__(None, None, None)


def state() -> tuple[Any, ...]:
    kinds = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return *kinds, torch.is_autocast_cache_enabled()


@given(nodes=nestings())
def test_autocast_nestings(nodes: list[Any], count: Callable[[str], None]) -> None:
    count("programs")
    before = state()
    plain, seen = Looks(), Looks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        play(nodes, plain)
        assert state() == before
        autocast = AutocastProbe()
        modules = ModuleProbe(seen, "cpu", autocast)
        with autocast, modules:
            play(nodes, seen)
    assert state() == before
    assert autocast.error is None
    assert modules.error is None
    assert seen.seen == plain.seen
    assert autocast.current is None
    told = [(c.autocast.enabled, c.autocast.dtype, c.autocast.cache) for c in modules.calls for _ in range(c.count)]
    if sorted(told) != sorted(seen.seen):
        count("false")
    assert sorted(told) == sorted(seen.seen)
    for call in modules.calls:
        region = next((r for r in autocast.regions if r.index == call.region), None)
        around = [] if region is None else [region]
        while around and around[-1].outer is not None:
            around.append(autocast.regions[around[-1].outer])
        acting = next((r for r in around if r.device_type == "cpu"), None)
        assert call.autocast.enabled == (acting.enabled if acting is not None else False)
