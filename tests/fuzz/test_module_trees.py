"""Random module trees, trained under random settings: nothing fails of ours, nothing changes, nothing is cried."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import random_state, same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ampcheck
from ampcheck import Severity

LEAVES = (
    *("linear", "norm", "relu", "relu_", "gelu", "dropout", "dropout_", "silu_", "batchnorm", "residual"),
    *("functional", "shared", "chunk", "attention", "buffer", "split_"),
)


class Piece(nn.Module):
    """What is not a module of its own in a network."""

    def __init__(self, how: str, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.how = how
        self.inner = inner if inner is not None else nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "residual":
            return x + self.inner(x)
        if self.how == "functional":
            return F.leaky_relu(F.linear(x, self.inner.weight, self.inner.bias), inplace=True)
        if self.how == "shared":
            return self.inner(self.inner(x).tanh())
        if self.how == "chunk":
            first, second = self.inner(x).chunk(2, -1)
            return torch.cat([first * second.sigmoid(), second], -1)
        if self.how == "attention":
            q = self.inner(x)[None, None]
            return F.scaled_dot_product_attention(q, q, q)[0, 0]
        if self.how == "split_":
            y = self.inner(x)
            y[:, :4] += 1
            return y
        if self.how == "checkpoint":
            return checkpoint(self.inner, x, use_reentrant=False) if torch.is_grad_enabled() else self.inner(x)
        return self.inner(x) * self.scale


class Listed(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def made(spec: Any) -> nn.Module:
    if isinstance(spec, str):
        leaves: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(8, 8),
            "norm": lambda: nn.LayerNorm(8),
            "relu": nn.ReLU,
            "gelu": nn.GELU,
            "relu_": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)),
            "dropout": lambda: nn.Dropout(0.2),
            "dropout_": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2, inplace=True)),
            "silu_": lambda: nn.Sequential(nn.LayerNorm(8), nn.SiLU(inplace=True)),
            "batchnorm": lambda: nn.BatchNorm1d(8),
        }
        return leaves[spec]() if spec in leaves else Piece(spec)
    kind, parts = spec
    inner = [made(part) for part in parts]
    if kind == "twice":
        return nn.Sequential(*inner, inner[0])
    if kind == "checkpoint":
        return Piece("checkpoint", nn.Sequential(*inner))
    return Listed(inner) if kind == "list" else nn.Sequential(*inner)


TREES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.tuples(
        st.sampled_from(("sequential", "list", "twice", "checkpoint")), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)
SETTINGS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from((None, torch.bfloat16, torch.float16)),
        "parameters": st.sampled_from((torch.float32, torch.float32, torch.float64, torch.bfloat16)),
        "scaled": st.booleans(), "accumulate": st.integers(1, 2), "clip": st.booleans(), "evaluate": st.booleans(),
        "optimizer": st.sampled_from((torch.optim.SGD, torch.optim.AdamW)), "set_to_none": st.booleans(),
    }
)  # fmt: skip


def train(tree: Any, options: dict[str, Any], told: list[str] | None) -> tuple[dict[str, Any], Exception | None, Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 8), made(tree), nn.Linear(8, 4)).to(options["parameters"])
    optimizer = options["optimizer"](model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if options["scaled"] else None
    region = (lambda: torch.autocast("cpu", dtype=options["dtype"])) if options["dtype"] else contextlib.nullcontext
    losses: list[Tensor] = []
    error = report = None
    guard = (
        ampcheck.watch(model, optimizer=optimizer, scaler=scaler, emit=told.append)
        if told is not None
        else contextlib.nullcontext()
    )
    try:
        with guard:
            for step in range(3):
                model.train()
                x = torch.randn(6, 8, dtype=options["parameters"])
                with region():
                    loss = model(x).float().square().mean() / options["accumulate"]
                (scaler.scale(loss) if scaler else loss).backward()
                losses.append(loss.detach())
                if (step + 1) % options["accumulate"]:
                    continue
                if scaler:
                    scaler.unscale_(optimizer)
                if options["clip"]:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                if scaler:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=options["set_to_none"])
                if options["evaluate"]:
                    model.eval()
                    with torch.no_grad(), region():
                        losses.append(model(x))
    except Exception as raised:  # noqa: BLE001 - it is looked at
        error = raised
    if told is not None:
        report = guard.report
    left = {
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }
    left["scaler"] = scaler.state_dict() if scaler else None
    left["gradients"] = [p.grad for p in model.parameters()]
    return left, error, report


@given(tree=TREES, options=SETTINGS)
def test_module_trees(tree: Any, options: dict[str, Any], count: Callable[[str], None]) -> None:
    count("programs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, error, _ = train(tree, options, None)
        told: list[str] = []
        watched, error_watched, report = train(tree, options, told)
    assert not any("AMP900" in line for line in told), told
    assert type(error) is type(error_watched)
    assert str(error) == str(error_watched)
    for name, value in plain.items():
        assert same(value, watched[name]), f"{name} is not bit-identical"
    if error is not None:
        count("raised")
        return
    errors = [(finding.code, finding.message) for finding in report.findings if finding.severity is Severity.ERROR]
    # A scaler that is used without autocast, or with low-precision parameters, is a fault of the settings.
    odd = (options["scaled"] and options["dtype"] is None, options["parameters"] is torch.bfloat16)
    if any(odd):
        count("of odd settings")
    elif errors:
        count("false")
        raise AssertionError(errors)
