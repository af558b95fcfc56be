"""What is told of the user's line is told of it under a watch too."""

from __future__ import annotations

import traceback
import warnings

import pytest
import torch
from torch import nn

from ampcheck import AmpChecker, watch


def enter_regions() -> None:
    with torch.autocast("cuda", dtype=torch.float16):
        pass
    with torch.autocast("cpu", dtype=torch.float32):
        pass
    with torch.cuda.amp.autocast():
        pass
    with torch.cpu.amp.autocast(dtype=torch.bfloat16):
        pass


def warned(watched: bool) -> list[tuple[str, str, int]]:
    checker = AmpChecker(report=False)
    checker.attach(nn.Linear(2, 2), emit=lambda text: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if watched:
            with checker.training_step():
                enter_regions()
        else:
            enter_regions()
    checker.detach()
    return [(str(one.message), one.filename, one.lineno) for one in caught]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a region for CUDA is no mistake here")
def test_warnings_of_autocast_name_the_line_that_they_name_without_a_watch() -> None:
    plain = warned(watched=False)
    assert len(plain) >= 4
    assert warned(watched=True) == plain


def told_once(watched: bool) -> int:
    """How many warnings a loop gives, where one a line is to be told."""
    checker = AmpChecker(report=False)
    checker.attach(nn.Linear(2, 2), emit=lambda text: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        globals().pop("__warningregistry__", None)
        for _ in range(3):
            with checker.training_step() if watched else torch.enable_grad():
                torch.autocast("cpu", dtype=torch.float32)
    checker.detach()
    return len([one for one in caught if one.filename == __file__])


def test_warnings_of_autocast_are_told_as_often_as_without_a_watch() -> None:
    assert told_once(watched=True) == told_once(watched=False)


def test_traceback_of_a_wrong_argument_has_no_frame_more() -> None:
    def frames(watched: bool) -> list[tuple[str, str, int | None]]:
        checker = AmpChecker(report=False)
        checker.attach(nn.Linear(2, 2), emit=lambda text: None)
        try:
            with checker.training_step() if watched else torch.enable_grad():
                torch.autocast("gpu")
        except RuntimeError as error:
            checker.diagnose(error)
            return [(one.filename, one.name, one.lineno) for one in traceback.extract_tb(error.__traceback__)]
        raise AssertionError("nothing was raised")

    assert frames(watched=True) == frames(watched=False)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.discriminator(self.generator(x))


def test_step_of_one_optimizer_before_the_backward_of_the_other_in_a_plain_loop() -> None:
    model = Gan()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.generator, model.discriminator)]

    def loop() -> None:
        for _ in range(2):
            loss_g = -model(torch.ones(2, 4)).mean()
            loss_d = model.discriminator(model.generator(torch.ones(2, 4)).detach()).mean()
            optimizers[1].zero_grad()
            loss_d.backward(retain_graph=True)
            optimizers[1].step()
            loss_g.backward()
            optimizers[0].step()

    watching = watch(model, optimizer=optimizers, report=False, emit=lambda text: None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), watching:
        loop()
    assert watching.report is not None
    (finding,) = (one for one in watching.report.findings if one.code.startswith("AMP4"))
    first = loop.__code__.co_firstlineno
    assert finding.code == "AMP405"
    sites = {site.role: site for site in finding.sites}
    assert sites["write"].line == first + 6
    assert "forward" in sites["save"].function
