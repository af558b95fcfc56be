"""Nothing inside a training program can tell a watched step from a plain one."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.optim.optimizer as optimizers
from loops import same, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode

import ampcheck

X = torch.linspace(-1, 1, 32).reshape(4, 8)


@contextlib.contextmanager
def watching(model: nn.Module | None, **options: Any) -> Iterator[Any]:
    said: list[str] = []
    with ampcheck.watch(model, emit=said.append, report=False, ignore="AMP107", **options) as watch:
        yield watch
    assert not any("AMP900" in line for line in said), said


def both(program: Callable[[Callable[..., Any]], Any]) -> tuple[Any, Any]:
    """What a program makes of itself, plain and watched."""
    results = []
    for guard in (lambda model, **_: contextlib.nullcontext(), watching):
        torch.manual_seed(0)
        results.append(program(guard))
    return results[0], results[1]


def assert_same(program: Callable[[Callable[..., Any]], Any]) -> None:
    __tracebackhide__ = True
    plain, watched = both(program)
    assert same(plain, watched)


class Looks(nn.Module):
    """Looks about itself in the middle of its forward."""

    def __init__(self, look: Callable[[], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.look()
        return self.linear(x)


def hook_tables() -> list[int]:
    tables = [
        table
        for owner in (nn.modules.module, optimizers)
        for name, table in vars(owner).items()
        if name.startswith("_global") and isinstance(table, dict)
    ]
    assert len(tables) >= 7
    return [len(table) for table in tables]


def made_since() -> int:
    """Graph nodes that a call makes, in numbers that say how many were made before."""
    leaf = torch.ones(1, requires_grad=True)
    return int((leaf * 2).grad_fn._sequence_nr()) - BEGAN[-1]


BEGAN: list[int] = []

LOOKS: dict[str, Callable[[], Any]] = {
    "hook tables": hook_tables,
    "function modes": torch._C._len_torch_function_stack,
    "dispatch modes": torch._C._len_torch_dispatch_stack,
    "has_torch_function": lambda: has_torch_function((X,)),
    "saved-tensor hooks": lambda: torch._C._autograd._saved_tensors_hooks_is_enabled(),
    "depth": lambda: len(inspect.stack(0)) - DEPTH[-1],
    "frames": lambda: [(f.filename, f.name) for f in traceback.extract_stack()[-6:-2]],
    "sequence numbers": made_since,
    "trace and profile": lambda: (sys.gettrace(), sys.getprofile()),
    "functions": lambda: [
        id(f) for f in (nn.Module.__call__, torch.autograd.backward, torch.autocast.__enter__, nn.Module.eval)
    ],
    "attributes": lambda: sorted({*vars(nn.Module), *vars(torch.autocast), *vars(torch.optim.Optimizer)}),
}
DEPTH: list[int] = []


@pytest.mark.parametrize("name", LOOKS)
def test_what_can_be_looked_at(name: str) -> None:
    def program(guard: Callable[..., Any]) -> Any:
        model = Looks(LOOKS[name])
        optimizer = sgd(model)
        DEPTH.append(len(inspect.stack(0)))
        BEGAN.append(torch._C._autograd._get_sequence_nr())
        with guard(model, optimizer=optimizer):
            loss = model(X).sum()
            within = model.seen, LOOKS[name]() if name != "frames" else None
            loss.backward()
            optimizer.step()
        return within

    plain, watched = both(program)
    assert plain == watched


@pytest.mark.parametrize("kind", [TorchFunctionMode, TorchDispatchMode])
def test_a_mode_of_the_users_is_called_as_often(kind: type) -> None:
    def program(guard: Callable[..., Any]) -> Any:
        calls: list[str] = []

        class Counting(kind):  # type: ignore[misc, valid-type]
            def __torch_function__(self, func, types, args=(), kwargs=None):
                calls.append(getattr(func, "__name__", str(func)))
                return func(*args, **(kwargs or {}))

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                calls.append(str(func))
                return func(*args, **(kwargs or {}))

        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8))
        optimizer = sgd(model)
        with guard(model, optimizer=optimizer):
            for _ in range(2):
                with Counting():
                    loss = model(X).square().mean()
                    loss.detach().numpy()
                    _ = loss.data
                    loss.backward()
                optimizer.step()
        return calls

    assert_same(program)


def test_a_tensor_subclass_is_called_as_often() -> None:
    calls: list[str] = []

    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    def program(guard: Callable[..., Any]) -> Any:
        calls.clear()
        model = nn.Linear(8, 8)
        with guard(model):
            model(X.clone().as_subclass(Own)).sum().backward()
        return list(calls)

    assert_same(program)


def fast_paths() -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
    x = X.reshape(2, 2, 8)
    padding = torch.tensor([[False, True], [False, False]])
    return {
        "encoder layer": lambda: (nn.TransformerEncoderLayer(**layer), (x,)),
        "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2), (x,)),
        "encoder, padded": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2), (x, None, padding)),
        "attention": lambda: (nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)),
        "decoder": lambda: (nn.TransformerDecoderLayer(**layer), (x, x)),
        "lstm": lambda: (nn.LSTM(8, 8, batch_first=True), (x,)),
        "gru": lambda: (nn.GRU(8, 8, bidirectional=True), (x,)),
        "conv": lambda: (nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU(inplace=True)), (x,)),
        "bilinear": lambda: (nn.Bilinear(8, 8, 4), (X, X)),
        "adaptive": lambda: (nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4]), (X, torch.arange(4))),
        "embedding bag": lambda: (nn.EmbeddingBag(8, 8), (torch.arange(8).reshape(2, 4),)),
        "fold": lambda: (nn.Fold((2, 2), 1), (torch.ones(1, 2, 4),)),
        "pool": lambda: (nn.FractionalMaxPool2d(2, output_size=2), (torch.rand(1, 2, 4, 4),)),
        "max pool": lambda: (nn.MaxPool1d(2), (x,)),
        "spectral norm": lambda: (nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), (X,)),
    }


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", fast_paths())
def test_modules_take_the_paths_that_they_take(name: str, amp: bool) -> None:
    """In evaluation mode inside the step, as a teacher or a frozen backbone is, and in training mode."""

    def program(guard: Callable[..., Any]) -> Any:
        module, inputs = fast_paths()[name]()
        student = nn.Linear(8, 8)
        found = []
        with guard(student), torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = student(X).float().sum()
            for training in (False, True):
                module.train(training).requires_grad_(training)
                with contextlib.nullcontext() if training else torch.no_grad():
                    torch.manual_seed(1)
                    try:
                        found.append(module(*inputs))
                    except RuntimeError as error:
                        found.append(str(error))
            outputs = [one for one in ampcheck.observe.autograd.tensors_in(found[-1]) if one.requires_grad]
            (loss + sum(one.float().sum() for one in outputs)).backward()
        found += [parameter.grad for parameter in (*module.parameters(), *student.parameters())]
        return [one.to_dense() if isinstance(one, Tensor) and one.is_sparse else one for one in flat(found)]

    assert_same(program)


def flat(values: Any) -> list[Any]:
    if isinstance(values, (list, tuple)):
        return [one for value in values for one in flat(value)]
    return [values]


def test_recursion_goes_as_deep() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int) -> Tensor:
            return self.linear(x) if depth == 0 else self(x, depth - 1)

    def program(guard: Callable[..., Any]) -> Any:
        model = Deep()
        # Of a model without an optimizer each call is asked whether there is one by now.
        optimizer = sgd(model)
        base = len(inspect.stack(0))
        low, high = 1, 200
        while high - low > 1:
            middle = (low + high) // 2
            limit = sys.getrecursionlimit()
            try:
                sys.setrecursionlimit(300 + base)
                with guard(model, optimizer=optimizer):
                    model(X, middle).sum().backward()
                low = middle
            except RecursionError:
                high = middle
            finally:
                sys.setrecursionlimit(limit)
        return low

    plain, watched = both(program)
    assert 50 < plain < 199
    # The frames of the `with` block around the call are one or two.
    assert abs(plain - watched) <= 1


def test_warnings_name_the_users_line() -> None:
    def program(guard: Callable[..., Any]) -> Any:
        model = nn.Conv2d(1, 1, 3, padding=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with guard(model):
                for _ in range(2):
                    with torch.autocast("cpu", dtype=torch.float64):
                        y = F.grid_sample(model(torch.ones(1, 1, 4, 4)), torch.zeros(1, 2, 2, 2))
                    y.sum().backward()
                    torch.nn.utils.clip_grad_norm_((one for one in ()), 1.0)
        return [(one.filename, one.lineno, str(one.message)[:20]) for one in caught]

    plain, watched = both(program)
    assert len(plain) >= 2
    assert plain == watched


def test_warnings_as_errors_beside_compiled_code() -> None:
    """PyTorch warns of global hooks where something is compiled: it has nothing to warn of."""
    compiled = torch.compile(nn.Linear(8, 8), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with watching(compiled):
            for _ in range(2):
                compiled(X).sum().backward()


@pytest.mark.parametrize("where", ["function", "child", "clip", "optimizer"])
def test_what_is_compiled_in_the_watched_step_compiles_once(where: str) -> None:
    from torch._dynamo.testing import CompileCounter

    def program(guard: Callable[..., Any]) -> Any:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        compiled: dict[str, Any] = {}
        with guard(model, optimizer=optimizer):
            for _ in range(4):
                y = model(X)
                if where == "function":
                    y = compiled.setdefault("f", torch.compile(lambda t: t.sin() * 2, backend=counter))(y)
                if where == "child":
                    y = compiled.setdefault("f", torch.compile(model[1], backend=counter))(y)
                y.square().mean().backward()
                if where == "clip":
                    clip = torch.compile(torch.nn.utils.clip_grad_norm_, backend=counter)
                    compiled.setdefault("f", clip)(list(model.parameters()), 1.0)
                if where == "optimizer":
                    compiled.setdefault("f", torch.compile(optimizer.step, backend=counter))()
                else:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return counter.frame_count, counter.op_count

    plain, watched = both(program)
    # Older PyTorch compiles no clipping.
    assert plain[0] >= 1 or where == "clip"
    assert plain == watched


def test_forward_in_threads() -> None:
    """The engine orders what several threads have made by their counts of nodes."""

    def program(guard: Callable[..., Any]) -> Any:
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        optimizer = sgd(model)
        inputs = [torch.randn(16, 8) for _ in range(4)]
        with guard(model, optimizer=optimizer):
            for _ in range(3):
                outputs: list[Tensor] = []
                for x in inputs[:2]:
                    thread = threading.Thread(target=lambda x=x, to=outputs: to.append(model(x)))  # type: ignore[misc]
                    thread.start()
                    thread.join()
                outputs += [model(x) for x in inputs[2:]]
                optimizer.zero_grad()
                sum(one.square().mean() for one in outputs).backward()  # type: ignore[union-attr]
                optimizer.step()
        return list(model.state_dict().values())

    # The first run in a process asks PyTorch once what it can do.
    both(program)
    assert_same(program)


def test_double_backward_and_forward_mode() -> None:
    def program(guard: Callable[..., Any]) -> Any:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        with guard(model):
            x = X.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            gradient.square().sum().backward()
            out, tangent = torch.func.jvp(
                lambda t: torch.index_add(model(t), 0, torch.arange(4), t, alpha=2), (X,), (X,)
            )
            hessian = torch.func.hessian(lambda t: model(t).sum())(X[:1])
        return [out, tangent, hessian, *(parameter.grad for parameter in model.parameters())]

    assert_same(program)


def test_data_and_numpy_share_memory_as_ever() -> None:
    def program(guard: Callable[..., Any]) -> Any:
        model = nn.Linear(8, 8)
        with guard(model):
            y = model(X)
            alias, array = y.data, y.detach().numpy()
            alias += 1
            array[0] = 3
            z = torch.empty(0).set_(alias)
            facts = [y.detach().clone(), alias._version, z._version, y._version, type(alias), alias.requires_grad]
            with pytest.raises(RuntimeError, match="numpy"):
                y.numpy()
            model.weight.data = model.weight.data * 2
            facts.append(model.weight.detach().clone())
            y.sum().backward()
        return [*facts, model.weight.grad]

    assert_same(program)


def test_the_survey_sees_what_it_looks_for() -> None:
    """With a hook and a mode of the kinds that were used once."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert sum(hook_tables()) == 1
        with TorchFunctionMode():
            assert has_torch_function((X,))
            assert torch._C._len_torch_function_stack() == 1
    finally:
        handle.remove()
