"""Numbers that fail in Lightning's real trainer, on real digits."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_layers import LAYERS, STEP, Angle, DigitNet, Late, Masked, Scores, Statistics, Variance, assert_true
from lightning_digits import digits_module, installed, loader, trainer

INSTALLED = installed()
if not INSTALLED:
    pytest.skip("neither of Lightning's packages is installed", allow_module_level=True)

from ampcheck.integrations.lightning import FIXES, AmpCheck  # noqa: E402

lightning = INSTALLED[0]


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fp16() -> dict[str, Any]:
    """``16-mixed`` as on a GPU; ``Trainer(precision="16-mixed")`` would turn it into ``bf16-mixed`` on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    return {"plugins": [lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler)]}


def bf16() -> dict[str, Any]:
    return {"precision": "bf16-mixed"}


def fitted(layer: Any, numerics: str, *, manual: bool = False, **options: Any) -> tuple[AmpCheck, Any, Any]:
    callback = AmpCheck(ignore=("AMP107", "AMP310"), numerics=numerics)
    module = digits_module(lightning, DigitNet(layer), manual=manual)
    run = trainer(lightning, callback, **options)
    run.fit(module, loader(count=192), loader("val", 32))
    return callback, module, run


def numeric(callback: AmpCheck) -> list[Any]:
    findings = callback.checker.report.findings
    return [one for one in findings if one.code.startswith("AMP5") and one.code not in ("AMP512", "AMP515")]


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("layer", LAYERS)
def test_guard(layer: type[Late], manual: bool) -> None:
    options = fp16() if layer.only_float16 else bf16()
    callback, _, _ = fitted(layer(), "guard", manual=manual, **options)
    (finding,) = numeric(callback)
    assert_true(finding, layer, "net.layer")
