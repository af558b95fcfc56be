"""Training programs that between them reach all of AmpCheck but the hosts.

Each takes ``arm``, inside of which AmpCheck may be made to fail, the list that AmpCheck talks into, and one for the
models; ``None`` in place of that first list runs the same without AmpCheck.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from loops import CNN, batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ampcheck

Arm = Callable[[], Any]


class Net(CNN):
    """Adds a float32 parameter to low-precision activations."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(10))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.gain


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Dubious(Net):
    """All that autograd's probe looks at: a checkpoint, hooks of its own, a custom function, writes past the check."""

    def forward(self, images: Tensor) -> Tensor:
        x = checkpoint(super().forward, images, use_reentrant=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            y = x.sigmoid() * 2
        first, _ = Cube.apply(x).chunk(2)
        z = x.tanh()
        z.data.mul_(0.5)
        u = x.detach().clone().requires_grad_()
        kept = u.exp()
        kept.detach().numpy()[0] = 1.0
        with torch.inference_mode():
            torch.ones(2).add_(1)
        return y + z + kept.mean() + first.mean()


class Fails(Net):
    """Fails in the way it is told, from the given call on."""

    def __init__(self, how: str, first: int = 0) -> None:
        super().__init__()
        self.how = how
        self.calls = -first

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 0 and self.how == "raise":
            raise LookupError("the user's own")
        if self.calls > 0 and self.how == "autocast":
            with torch.autocast(device="cpu"):
                return super().forward(images)
        x = super().forward(images)
        if self.calls <= 0:
            return x
        if self.how == "in place":
            x = x.exp()
            return F.dropout(x, 0.5, inplace=True)
        if self.how == "split":
            first, _ = x.split(5, 1)
            first.mul_(2)
        if self.how == "dtype":
            with torch.autocast("cpu", enabled=False):
                return F.linear(x.bfloat16(), self.gain[None])
        if self.how == "graph":
            x.sum().backward()
        if self.how == "raise after":
            raise LookupError("the user's own")
        return x


def guard(told: list[str] | None, model: nn.Module | None, **options: Any) -> Any:
    return contextlib.nullcontext() if told is None else ampcheck.watch(model, emit=told.append, **options)


def step(model: nn.Module, optimizer: Any, batch: Any, scaler: Any = None, dtype: Any = torch.bfloat16) -> Tensor:
    images, labels = batch
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(model(images), labels)
    if scaler is None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


def after(model: nn.Module, optimizer: Any, losses: list[Tensor], scaler: Any = None) -> dict[str, Any]:
    """What must not depend on AmpCheck, held by nothing of the model."""
    return {
        "losses": losses,
        "model": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def loop(
    make: Callable[[], nn.Module], *, scaled: bool = False, given: bool = True, steps: int = 2
) -> Callable[..., Any]:
    def program(arm: Arm, told: list[str] | None, models: list[Any], **options: Any) -> Any:
        model = make()
        models.append(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        if given:
            options = {"optimizer": optimizer, "scaler": scaler, **options}
        watch = guard(told, model if given else None, **options)
        losses: list[Tensor] = []
        with arm(), watch:
            for batch in batches(steps, 8):
                model.train()
                losses.append(step(model, optimizer, batch, scaler, torch.float16 if scaled else torch.bfloat16))
            model.eval()
            with torch.no_grad():
                losses.append(model(batch[0]))
            model.train()
            losses.append(step(model, optimizer, batch, scaler))
        return after(model, optimizer, losses, scaler)

    return program


def hosted(make: Callable[[], nn.Module], steps: int = 2) -> Callable[..., Any]:
    """As an adapter does it: the checker's methods, and the failing batch handed over for a replay."""

    def program(arm: Arm, told: list[str] | None, models: list[Any]) -> Any:
        model = make()
        models.append(model)
        optimizer = torch.optim.Adam(model.parameters())
        scaler = torch.amp.GradScaler("cpu")
        checker = ampcheck.AmpChecker(report=False)
        losses: list[Tensor] = []

        def again(batch: Any) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.cross_entropy(model(batch[0]), batch[1])

        with arm():
            try:
                if told is not None:
                    host = ampcheck.Host("a host", "1", {"AMP401": "Write out of place."})
                    checker.attach(
                        model,
                        optimizers=[optimizer],
                        scaler=scaler,
                        averaged=copy.deepcopy(model),
                        host=host,
                        emit=told.append,
                    )
                for batch in batches(steps, 8):
                    try:
                        with checker.training_step() if told is not None else contextlib.nullcontext():
                            losses.append(step(model, optimizer, batch, scaler))
                    except Exception as error:
                        if told is not None:
                            checker.diagnose(error, batch=lambda batch=batch: again(batch))
                        raise
                model.eval()
                with checker.evaluation_step() if told is not None else contextlib.nullcontext(), torch.no_grad():
                    losses.append(model(batch[0]))
            finally:
                if told is not None:
                    checker.detach()
        return after(model, optimizer, losses, scaler)

    return program


def compiled(arm: Arm, told: list[str] | None, models: list[Any]) -> Any:
    torch._dynamo.reset()
    return loop(lambda: torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), backend="eager"))(
        arm, told, models
    )


def idle(arm: Arm, told: list[str] | None, models: list[Any]) -> Any:
    """Nothing trains."""
    models.append(CNN())
    watch = guard(told, None)
    with arm(), watch:
        pass
    return 0


def untrained(arm: Arm, told: list[str] | None, models: list[Any]) -> Any:
    model = CNN()
    models.append(model)
    watch = guard(told, model)
    with arm(), watch:
        model.eval()
    return 0


def exports(arm: Arm, told: list[str] | None, models: list[Any]) -> Any:
    """Trains, exports, and goes on after an export that dies."""
    model = CNN()
    models.append(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = guard(told, model, optimizer=optimizer)
    with arm(), watch:
        losses = [step(model, optimizer, batch, None) for batch in batches(2, 8)]
        example = next(iter(batches(1, 2)))[0]
        traced = torch.jit.trace(model.eval(), example, check_trace=False)
        with contextlib.suppress(RuntimeError):
            torch.jit.trace(Unregistered(), torch.ones(2))
        losses.append(traced(example))
    return after(model, optimizer, losses, None)


class Unregistered(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [torch.ones(2, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gains[0]


PROGRAMS: dict[str, Callable[..., Any]] = {
    "trains": loop(Net, scaled=True),
    "trains unasked": loop(Net, given=False),
    "trains dubiously": loop(Dubious),
    "hosted": hosted(Net),
    "idle": idle,
    "untrained": untrained,
    "dies in backward": loop(lambda: Fails("in place")),
    "dies of a dtype": loop(lambda: Fails("dtype")),
    "dies of autocast": loop(lambda: Fails("autocast", 1)),
    "dies of a view": loop(lambda: Fails("split")),
    "dies later": hosted(lambda: Fails("in place", 1)),
    "dies later of a graph": hosted(lambda: Fails("graph", 1)),
    "dies later of a dtype": hosted(lambda: Fails("dtype", 1)),
    "dies by itself": loop(lambda: Fails("raise")),
    "dies by itself later": loop(lambda: Fails("raise after", 1)),
    "compiled": compiled,
    "exports": exports,
}
