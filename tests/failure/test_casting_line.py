"""The line that made parameters float16, where the source has just one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ampcheck.failure import examine
from ampcheck.trace import LowPrecisionGradients


class Net(nn.Module):
    def __init__(self, *, half: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        if half:
            self.head.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return self.head(self.body(x))


class HalfNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.half()  # in the class

    def export(self) -> None:
        self.half()


def unscale(model: nn.Module) -> None:
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), 0.1)
    scaler.scale(model(torch.ones(2, 4)).float().sum()).backward()
    scaler.unscale_(optimizer)


def one_line() -> None:
    model, other = Net(), Net()
    other.half()
    model.half()  # cast
    unscale(model)


def by_dtype() -> None:
    model = Net()
    model.body.to("cpu", torch.float16)  # cast
    model.head.to(torch.float32)
    unscale(model)


def by_name() -> None:
    model = Net().half()  # cast
    unscale(model)


def two_lines() -> None:
    model = Net()
    model.body.half()
    model.head.half()
    unscale(model)


def under_a_condition() -> None:
    unscale(Net(half=True))


def under_a_condition_that_holds() -> None:
    model, half = Net(), "yes"
    if half != "no":
        model.half()  # cast
    if not half:
        model.float()
    unscale(model)


def after_the_training() -> None:
    model = Net()
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()}, assign=True)
    model.requires_grad_()
    unscale(model)
    model.half()
    torch.save(model.state_dict(), "model.pt")


def in_the_class() -> None:
    unscale(HalfNet())


@pytest.mark.parametrize(
    ("program", "code"),
    [
        (one_line, "model.half()  # cast"),
        (by_dtype, 'model.body.to("cpu", torch.float16)  # cast'),
        (by_name, "model = Net().half()  # cast"),
        (two_lines, None),
        (under_a_condition, None),
        (under_a_condition_that_holds, "model.half()  # cast"),
        (after_the_training, None),
        (in_the_class, "self.head.half()  # in the class"),
    ],
)
def test_line_that_casts(program, code: str | None) -> None:
    with pytest.raises(ValueError, match="Attempting to unscale FP16") as caught:
        program()
    frame = caught.value.__traceback__
    while frame.tb_next is not None and "model" not in frame.tb_frame.f_locals:
        frame = frame.tb_next
    failure = examine(caught.value, model=frame.tb_frame.f_locals["model"], phase="unscale", step=0)
    assert isinstance(failure.facts, LowPrecisionGradients)
    cast = failure.facts.cast
    assert (cast.code if cast is not None else None) == code
    assert cast is None or cast.role == "cast"
