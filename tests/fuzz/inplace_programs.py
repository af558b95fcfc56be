"""Random programs that write in place, and an oracle that knows from the program alone what they do.

A program is the forward of a module, one statement a line, in a file of its own. The oracle runs it a second time
under saved-tensor hooks that keep a copy of each saved tensor: what backward makes of the copies are the true
gradients. A tracer of the program's lines sees which line changed which version counter and which content.
"""

from __future__ import annotations

import itertools
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import eq
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hypothesis import strategies as st
from loading import line_of, load
from torch import Tensor, nn
from torch.nn import functional as F

UNARY = (
    *("{}.exp()", "{}.sigmoid()", "{}.tanh()", "{}.relu()", "{}.softmax(-1)", "{}.sin()", "{}.square()", "{}.abs()"),
    *("F.gelu({})", "F.silu({})", "{}.neg()", "{} + 1", "{} * 2", "{}.clone()", "F.leaky_relu({})", "{}.cumsum(0)"),
    *("F.layer_norm({}, {}.shape[-1:])", "{}.clamp(-1, 1)", "{}.pow(3)", "F.normalize({}, dim=-1)", "Square.apply({})"),
    *("{}.exp().mul_(2)", "{}.clone().relu_()", "F.dropout({}, 0.5)", "torch.cat([{}, {}])", "{}.rsqrt().nan_to_num()"),
)
BINARY = (
    *(
        "{} * {}",
        "{} + {}",
        "{} - {}",
        "torch.maximum({}, {})",
        "{0} / ({1}.abs() + 1)",
        "torch.where({0} > 0, {0}, {1})",
    ),
    *("torch.lerp({}, {}, 0.5)", "F.mse_loss({}, {}, reduction='none')", "torch.addcmul({0}, {1}, {1})"),
)
PRODUCTS = ("{} @ {}", "F.linear({}, {})", "torch.mm({}, {})")
VIEWS = (
    "{}[:2]",
    "{}[0]",
    "{}.t()",
    "{}[:, 1:3]",
    "{}.view(-1)",
    "{}.reshape({}.shape)",
    "{}.unsqueeze(0)",
    "{}.detach()",
)
SEVERAL = (("{}.chunk(2)", 2), ("{}.split(2)", 2), ("{}[:2].unbind()", 2), ("torch.stack([{}, {}]).unbind()", 2))
UNTRACKED_VIEWS = ("{}.data", "{}.detach().clone()", "{}.detach()")
WRITES = (
    *(
        "{}.add_(1)",
        "{}.mul_(2)",
        "{}.relu_()",
        "{}.sigmoid_()",
        "{}.zero_()",
        "{} += 1",
        "{} *= 0.5",
        "{}.clamp_(min=0)",
    ),
    *("F.relu({}, inplace=True)", "F.dropout({}, 0.5, inplace=True)", "{}[0] = 1.5", "{}[:1] += 1", "{}.fill_(0.5)"),
    *(
        "{}.exp_()",
        "{0}.masked_fill_({0} > 0, 0.1)",
        "torch._foreach_add_([{}], 1.0)",
        "{}.neg_()",
        "F.silu({}, inplace=True)",
    ),
    *("{}.abs_().add_(1).sqrt_()", "torch._foreach_mul_([{}], 3.0)", "{}.mul_(1)"),
)
WRITES_OF_TWO = (
    "{}.add_({})",
    "{}.mul_({})",
    "{}.copy_({})",
    "{} += {}",
    "{} -= {}",
    "{0}[:1] = {1}[:1]",
    "{0}.addcmul_({1}, {1})",
)
UNCOUNTED = (
    *("{}.data.mul_(2)", "{}.data[0] = 3.0", "{}.data.copy_({}.data + 1)", "{}.data.add_(1)", "{}.data.mul_(1)"),
    "torch._foreach_mul_([{}.data], 2.0)",
)
WITHOUT_GRAD = (
    "{}.detach().add_(1)",
    "with torch.no_grad(): {}.mul_(2)",
    "with torch.no_grad(): {}.add_(1)",
    "{}.detach()[0] = 2.0",
)
LEAVES = {"w": (4, 4), "p": (4, 4), "q": (4,), "b": (4, 4), "x": (4, 4)}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@dataclass
class Program:
    """The source of a forward. ``optimizer``: the lines that step."""

    statements: list[str]
    stepping: set[int] = field(default_factory=set)

    FIRST = 3

    @property
    def source(self) -> str:
        return "\n".join(
            [
                "def forward(self, x):",
                "    w, p, q, b = self.w, self.p, self.q, self.b",
                *("    " + s for s in self.statements),
            ]
        )

    def load(self, folder: Path) -> Loaded:
        return Loaded(self, *load(self.source, folder, {"torch": torch, "F": F, "Square": Square}))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    shapes: dict[str, tuple[int, ...]] = dict(LEAVES)
    statements: list[str] = []
    stepping: set[int] = set()
    numbers = itertools.count()
    # What ops have taken and made, and so may have saved.
    kept: list[str] = []

    def one(fits: Callable[[tuple[int, ...]], bool], *, leaves: bool = True) -> str:
        names = [name for name, shape in shapes.items() if fits(shape)]
        made = [name for name in names if name not in LEAVES]
        trained = [name for name in names if name in ("w", "p")]
        if trained and not made and draw(st.integers(0, 3)):
            names = trained
        return draw(st.sampled_from(made if made and (not leaves or draw(st.integers(0, 2))) else names))

    def of(template: str, name: str, other: str | None = None) -> str:
        return template.format(name, other or name)

    def new(expression: str, shape: tuple[int, ...]) -> str:
        # A variable that is written over keeps its tensor alive in the graph alone.
        name = (
            f"v{next(numbers)}"
            if draw(st.integers(0, 3))
            else draw(st.sampled_from([n for n in shapes if n not in LEAVES] or ["v0"]))
        )
        shapes.pop(name, None)
        shapes[name] = shape
        statements.append(f"{name} = {expression}")
        return name

    makes = ("unary", "unary", "binary", "product", "view", "several")
    counted = ("write", "write2", "no_grad")
    writes = draw(st.sampled_from((counted, ("uncounted",), (*counted, "uncounted"))))
    built = draw(st.integers(1, 7))
    for position in range(draw(st.integers(5, 14))):
        kinds = makes if position < built else (*makes, *writes * 4, "untracked", "rare")
        kind = draw(st.sampled_from(kinds))
        leaves = kind not in writes or draw(st.integers(0, 9)) == 0
        recent = [n for n in kept[-6:] if n not in LEAVES and len(shapes.get(n, ())) == 2 and shapes[n][0] > 1]
        if kind in writes and recent and draw(st.integers(0, 3)):
            name = draw(st.sampled_from(recent))
        else:
            name = one(lambda s: len(s) == 2 and s[0] > 1, leaves=leaves)
        shape = shapes[name]
        rows = (shape[0] * 2, *shape[1:])
        if kind == "unary":
            template = draw(st.sampled_from(UNARY))
            kept += name, new(of(template, name), rows if template.startswith("torch.cat") else shape)
        elif kind == "binary":
            other = one(partial(eq, shape))
            kept += name, other, new(of(draw(st.sampled_from(BINARY)), name, other), shape)
        elif kind == "product":
            first, second = one(lambda s: s == (4, 4)), one(lambda s: s == (4, 4))
            kept += first, second, new(of(draw(st.sampled_from(PRODUCTS)), first, second), (4, 4))
        elif kind in ("view", "untracked"):
            template = draw(st.sampled_from(VIEWS if kind == "view" else UNTRACKED_VIEWS))
            expression = of(template, name)
            new(expression, tuple(eval(expression, {name: torch.ones(shape), "torch": torch}).shape))
        elif kind == "several":
            template, count = draw(st.sampled_from(SEVERAL))
            expression = of(template, name)
            value = eval(expression, {name: torch.ones(shape), "torch": torch})
            names = [f"v{next(numbers)}" for _ in value]
            if len(value) == count:
                shapes.update((n, tuple(v.shape)) for n, v in zip(names, value, strict=True))
                statements.append(f"{', '.join(names)} = {expression}")
        elif kind == "rare":
            rare = draw(st.sampled_from(("step", "backward", "numpy")))
            if rare == "step":
                stepping.add(len(statements) + Program.FIRST)
                statements.append("self.optimizer.step()")
            elif rare == "backward":
                statements.append(f"({name}.sum() + w.sum()).backward(retain_graph=True)")
            else:
                statements.append(f"{name}.detach().numpy()[0] = 2.0")
        else:
            templates = {"write": WRITES, "write2": WRITES_OF_TWO, "uncounted": UNCOUNTED, "no_grad": WITHOUT_GRAD}[
                kind
            ]
            other = one(partial(eq, shape)) if kind == "write2" else None
            statements.append(of(draw(st.sampled_from(templates)), name, other))
    used = draw(
        st.lists(
            st.sampled_from([name for name in shapes if name not in LEAVES] or ["w"]),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    used += [name for name in dict.fromkeys(kept[-4:]) if name in shapes and name not in (*LEAVES, *used)]
    statements.append(
        f"return {' + '.join(f'{n}.square().sum()' if i % 2 else f'{n}.sum()' for i, n in enumerate(used))} + w.sum()"
    )
    return Program(statements, stepping)


class Net(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name in ("w", "p"):
            setattr(self, name, nn.Parameter(torch.rand(4, 4, generator=generator) - 0.3))
        self.q = nn.Parameter(torch.rand(4, generator=generator))
        self.register_buffer("b", torch.rand(4, 4, generator=generator))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.program = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x)


@dataclass(frozen=True)
class Save:
    """A saved tensor: the line that ran, the storage, and the version it had."""

    line: int
    key: int
    version: int
    alias: Tensor
    copy: Tensor


@dataclass(frozen=True)
class Wrote:
    """A line that changed a storage: its version counter (``before`` to ``after``), or its content alone."""

    line: int
    key: int
    before: int
    after: int


@dataclass
class Outcome:
    """What became of a run: gradients, or what was raised and in which line of the program."""

    error: Exception | None
    line: int | None
    gradients: list[Tensor | None]
    state: list[Tensor]


@dataclass
class Truth(Outcome):
    """... and what the oracle saw: the first saved tensor that backward found written to, the saved tensors whose
    content was another (by untracked writes alone), and all writes by line."""

    stale: Save | None = None
    overwritten: list[Save] = field(default_factory=list)
    wrote: list[Wrote] = field(default_factory=list)
    stored: set[int] = field(default_factory=set)
    """The storages of parameters and buffers."""

    def writes_since(self, save: Save) -> set[int]:
        """The lines whose writes took the tensor past the version it was saved with."""
        return {w.line for w in self.wrote if w.key == save.key and w.after > save.version and w.after != w.before}


@dataclass
class Loaded:
    program: Program
    path: str
    forward: Any

    def net(self) -> Net:
        return Net(self.forward)

    def loss(self, net: Net) -> Tensor:
        torch.manual_seed(3)
        return net(torch.linspace(-1, 1, 16).reshape(4, 4))

    def run(self, net: Net) -> Outcome:
        error = None
        try:
            self.loss(net).backward()
        except Exception as raised:  # noqa: BLE001 - it is looked at
            error = raised
        return self.outcome(net, error)

    def outcome(self, net: Net, error: Exception | None) -> Outcome:
        gradients = [parameter.grad for parameter in net.parameters()]
        return Outcome(error, line_of(error, self.path), gradients, [*net.parameters(), net.b])

    def truth(self) -> Truth:
        """The same run with a copy of each saved tensor."""
        truth = Truth(None, None, [], [])
        frame: FrameType | None = None
        known: dict[int, tuple[int, Tensor, Tensor]] = {}
        at = 0

        def look() -> None:
            assert frame is not None
            values = [v for v in frame.f_locals.values() if isinstance(v, Tensor)]
            for tensor in values:
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                # A storage has one content and may have several version counters, of which the largest counts here.
                flat = torch.empty(0).set_(storage)
                version = max(t._version for t in values if t.untyped_storage().data_ptr() == key)
                before = known.get(key)
                if (
                    before is not None
                    and before[2].untyped_storage().data_ptr() == key
                    and before[1].numel() == flat.numel()
                ):
                    if before[0] < version or not _equal(before[1], flat):
                        truth.wrote.append(Wrote(at, key, min(before[0], version), version))
                elif before is None and at > 2 and version:
                    # Made and written to in one line.
                    truth.wrote.append(Wrote(at, key, 0, version))
                known[key] = version, flat.clone(), flat

        def trace(running: FrameType, event: str, _: Any) -> Any:
            nonlocal frame, at
            if running.f_code is not self.forward.__code__:
                return None
            frame = running
            if event == "line":
                look()
                at = running.f_lineno
            elif event == "return":
                look()
            return trace

        def pack(tensor: Tensor) -> Save:
            alias = tensor.detach()
            return Save(at, tensor.untyped_storage().data_ptr(), tensor._version, alias, alias.clone())

        def unpack(save: Save) -> Tensor:
            if save.alias._version != save.version:
                truth.stale = truth.stale or save
            elif not _equal(save.alias, save.copy):
                truth.overwritten.append(save)
            return save.copy

        net = self.net()
        truth.stored = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), net.b)}
        error = None
        tracing = sys.gettrace()
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                sys.settrace(trace)
                try:
                    loss = self.loss(net)
                finally:
                    sys.settrace(tracing)
                loss.backward()
        except Exception as raised:  # noqa: BLE001 - it is looked at
            error = raised
        vars(truth).update(vars(self.outcome(net, error)))
        return truth

    def close(self) -> None:
        linecache.cache.pop(self.path, None)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))


def same_gradients(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or _equal(a, b)) for a, b in zip(one, other, strict=True)
    )
