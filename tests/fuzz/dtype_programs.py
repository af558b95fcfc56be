"""Random programs over tensors of random dtypes, under random autocast regions, and an oracle of what fails in them.

Every shape fits, and in float32 every program runs: what PyTorch refuses, it refuses for a dtype. The oracle watches
the plain run from the outside: which function was called last, in which module, with which dtypes, and whether
autocast was on.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from loading import line_of, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

DTYPES = ("float32", "float16", "bfloat16", "float64")
CASTS = ("{}.float()", "{}.half()", "{}.bfloat16()", "{}.double()", "{}.to(x.dtype)", "{}.type_as(w)")
MODULES = (
    *("self.linear({})", "self.norm({})", "self.conv({}[None])[0]", "self.prelu({})", "self.cell({})"),
    *("self.attention({0}[None], {0}[None], {0}[None])[0][0]", "self.lstm({})[0]", "self.bilinear({0}, {0})"),
)
UNARY = (
    *("{}.relu()", "{}.softmax(-1)", "F.gelu({})", "{}.cumsum(0)", "torch.cdist({0}, {0}, p=1)", "{}.pow(2)"),
    *("torch.linalg.inv({} + 3 * torch.eye(4, dtype={}.dtype))", "torch.fft.rfft({}).real[:, [0, 1, 1, 0]]"),
    *("torch.quantile({}.detach(), 0.5, dim=0).expand(4, 4)", "torch.tensor({}.detach().numpy())", "{}.exp()"),
    *("{}.median(0).values.expand(4, 4)", "F.layer_norm({}, (4,))", "torch.logsumexp({}, 0, True).expand(4, 4)"),
    *("torch.linalg.svdvals({}).expand(4, 4)", "F.interpolate({}[None], 4)[0]", "F.normalize({})"),
)
BINARY = (
    *("{} @ {}", "torch.mm({}, {})", "{} + {}", "{} * {}", "torch.addmm({0}, {0}, {1})", "torch.addmm({1}, {0}, {0})"),
    *("torch.cat([{}, {}])[:4]", "torch.stack([{}, {}])[1]", "torch.einsum('ij,jk->ik', {}, {})", "F.linear({}, {})"),
    *("F.scaled_dot_product_attention({0}[None], {1}[None], {0}[None])[0]", "torch.where({0} > 0, {0}, {1})"),
    *("torch.lerp({}, {}, 0.5)", "torch.outer({}[0], {}[0])", "torch.mv({}, {}[0]).expand(4, 4)"),
    *("torch.dot({}[0], {}[0]).expand(4, 4)", "F.mse_loss({}, {}, reduction='none')", "F.linear({0}, {0}, {1}[0])"),
    "F.binary_cross_entropy({}.sigmoid(), {}.sigmoid(), reduction='none')",
    *("F.cross_entropy({}, {}.softmax(-1))[None].expand(4, 4)", "F.conv1d({}[None], {}[:, :, None])[0]"),
    *("F.grid_sample({}[None, None], {}[None, :, :, None].tanh().expand(1, 4, 4, 2))[0, 0]", "Product.apply({}, {})"),
    *("torch.bmm({}[None], {}[None])[0]", "torch.tensordot({}, {}, 1)", "torch.chain_matmul({}, {})"),
    *("torch.cdist({}, {})", "F.batch_norm({0}, None, None, {1}[0], training=True)", "F.layer_norm({}, (4,), {}[0])"),
    *("F.huber_loss({}, {}, reduction='none')", "torch.maximum({}, {})", "F.embedding(ids, {1}) + {0}"),
    *(
        "torch.mm({}.detach(), {}.detach(), out=torch.empty(4, 4))",
        "F.prelu({}, {}[0])",
        "torch.matmul({}[0], {})[None]",
    ),
)
WRITES = (
    *("[[0, 1]] = {1}[:2]", "[:2] = {1}[:2]", "[{0} > 0] = {1}[{0} > 0]", ".index_add_(0, ids, {1})", ".add_({1})"),
    *(
        ".index_copy_(0, ids, {1})",
        ".masked_scatter_({0} > 0, {1})",
        ".scatter_(0, ids[None], {1})",
        ".addmm_({1}, {1})",
    ),
    *(
        ".put_(ids, {1}[0])",
        ".scatter_add_(0, ids[None], {1})",
        ".copy_({1})",
        ".addcmul_({1}, {1})",
        ".lerp_({1}, 0.5)",
    ),
)
REGIONS = (None, "dtype=torch.bfloat16", "dtype=torch.float16")


class Product(torch.autograd.Function):
    """A product of matrices whose inputs nobody casts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.mm(x, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return gradient.to(y.dtype) @ y.t(), x.t() @ gradient.to(x.dtype)


@dataclass(frozen=True)
class Program:
    """The statements of a forward, the dtypes of the modules, parameters and the input by name, and the argument of
    the autocast region around it all."""

    statements: tuple[str, ...]
    dtypes: dict[str, str]
    region: str | None

    @property
    def source(self) -> str:
        head = "def forward(self, x):\n    w, b, ids = self.w, self.b, self.ids"
        return "\n".join([head, *(f"    {statement}" for statement in self.statements)])

    def in_float32(self) -> Program:
        plain = tuple(
            re.sub(
                r"\.(half|bfloat16|double)\(\)", ".float()", re.sub(r"^with torch\.autocast\(.*?\): ", "", statement)
            )
            for statement in self.statements
        )
        return Program(plain, dict.fromkeys(self.dtypes, "float32"), None)

    def load(self, folder: Path) -> Loaded:
        return Loaded(self, *load(self.source, folder, {"torch": torch, "F": F, "Product": Product}))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    # Mostly one other dtype than float32: a program of all four fails at once.
    low = draw(st.sampled_from(DTYPES[1:]))
    mixed = st.sampled_from(("float32", "float32", "float32", low, low, draw(st.sampled_from(DTYPES))))
    kept = draw(st.booleans())
    dtypes = {name: "float32" if kept else draw(mixed) for name in Net.NAMES}
    dtypes["x"] = draw(mixed)
    names = ["x", "w", "b"]
    statements: list[str] = []
    for number in range(draw(st.integers(1, 8))):
        name, other = draw(st.sampled_from(names[-3:])), draw(st.sampled_from(names))
        kind = draw(st.sampled_from(("cast", "module", "module", "unary", "binary", "binary", "write")))
        new = f"v{number}"
        if kind == "write":
            template = draw(st.sampled_from(WRITES))
            statement = f"{new} = {name}.clone(); {new}{template.format(name, other)}"
        else:
            templates = {"cast": CASTS, "module": MODULES, "unary": UNARY, "binary": BINARY}[kind]
            statement = f"{new} = {draw(st.sampled_from(templates)).format(name, other)}"
        region = draw(st.sampled_from((None,) * 6 + ("enabled=False", "enabled=False", *REGIONS[1:])))
        statements.append(f"with torch.autocast('cpu', {region}): {statement}" if region else statement)
        names.append(new)
    used = dict.fromkeys(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)) + names[-1:])
    statements.append(f"return {' + '.join(f'{name}.float().sum()' for name in used)}")
    return Program(tuple(statements), dtypes, draw(st.sampled_from(REGIONS)))


class Net(nn.Module):
    NAMES = ("linear", "norm", "conv", "prelu", "cell", "attention", "lstm", "bilinear", "w", "b")

    def __init__(self, forward: Any, dtypes: dict[str, str]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.prelu = nn.PReLU()
        self.cell = nn.GRUCell(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.lstm = nn.LSTM(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.w = nn.Parameter(torch.rand(4, 4))
        self.register_buffer("b", torch.rand(4, 4))
        self.register_buffer("ids", torch.arange(4))
        self.program = forward
        for name, dtype in dtypes.items():
            if isinstance(part := getattr(self, name, None), nn.Module):
                part.to(getattr(torch, dtype))
            elif part is not None:
                part.data = part.data.to(getattr(torch, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x)


@dataclass
class Called(TorchFunctionMode):
    """The function that was called last and did not return."""

    name: str = ""
    dtypes: set[str] = field(default_factory=set)
    enabled: bool = False
    module: str | None = None
    stack: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        module = self.stack[-1] if self.stack else None
        output = None
        enabled = torch.is_autocast_enabled("cpu")
        try:
            output = func(*args, **kwargs or {})
        except Exception:
            found = {str(tensor.dtype).removeprefix("torch.") for tensor in _tensors((args, kwargs or {}))}
            self.name, self.dtypes, self.enabled, self.module = getattr(func, "__name__", ""), found, enabled, module
            raise
        return output


@dataclass
class Outcome:
    error: Exception | None
    line: int | None
    state: list[Tensor | None]


@dataclass
class Loaded:
    program: Program
    path: str
    forward: Any

    def net(self) -> Net:
        return Net(self.forward, self.program.dtypes)

    def train(self, net: Net) -> None:
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 16).reshape(4, 4).to(getattr(torch, self.program.dtypes["x"]))
        region = self.program.region
        with eval(f"torch.autocast('cpu', {region})") if region else nullcontext():
            loss = net(x)
        if loss.requires_grad:
            loss.backward()

    def outcome(self, net: Net, error: Exception | None) -> Outcome:
        state = [tensor for parameter in net.parameters() for tensor in (parameter.detach(), parameter.grad)]
        return Outcome(error, line_of(error, self.path), state)

    def run(self) -> Outcome:
        net = self.net()
        try:
            self.train(net)
        except Exception as error:  # noqa: BLE001 - it is looked at
            return self.outcome(net, error)
        return self.outcome(net, None)

    def called(self) -> Called:
        """The same run, looked at: what was called last."""
        net, called = self.net(), Called()
        names = {id(module): name for name, module in net.named_modules()}
        handles = [
            register_module_forward_pre_hook(lambda module, args: called.stack.append(names[id(module)])),
            register_module_forward_hook(lambda module, args, output: called.stack.pop() and None),
        ]
        try:
            with called:
                self.train(net)
        except Exception:  # noqa: BLE001, S110 - the plain run tells of it
            pass
        finally:
            for handle in handles:
                handle.remove()
        return called

    def close(self) -> None:
        linecache.cache.pop(self.path, None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
