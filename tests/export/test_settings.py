"""Two eager settings, module by module; the picture; the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from export_forms import exported
from faulty import Net, NumpyTanh, TorchTanh
from torch import nn

import ampcheck
from ampcheck.cli import main

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Coarse(nn.Module):
    """Loses what it is given but for a few bits."""

    def forward(self, x):
        return (x + 1000).to(torch.bfloat16).float() - 1000 if torch.is_autocast_enabled("cpu") else x


def test_autocast_against_float32_ranks_the_modules():
    torch.manual_seed(0)
    model = Net(Coarse()).eval()
    report = ampcheck.compare_settings(model, X, ampcheck.Setting(autocast=torch.bfloat16))
    assert report.findings == ()
    comparison = report.comparison
    assert not comparison.equal
    assert comparison.first_module.module == "body.1"
    assert comparison.culprit == "body.1"
    ranked = comparison.ranked()
    assert [module.relative for module in ranked] == sorted((m.relative for m in ranked), reverse=True)
    assert [module.module for module in comparison.modules][:3] == ["body.0", "body.1", "body.2"]
    text = str(report)
    assert "autocast bfloat16 against as it is" in text
    assert text.index("body.1") < text.index("body.0")


def test_a_setting_with_itself_is_equal_and_leaves_the_model_alone():
    model = Net(TorchTanh()).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ampcheck.compare_settings(model, X, ampcheck.Setting()).comparison.equal
    half = ampcheck.compare_settings(model, X, ampcheck.Setting(dtype=torch.bfloat16, device="cpu"))
    assert half.comparison.second == "bfloat16, on cpu"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_inputs_the_model_does_not_run_on():
    with pytest.raises(ValueError, match="does not run on the inputs"):
        ampcheck.compare_settings(Net(TorchTanh()), torch.randn(3, 5), ampcheck.Setting(autocast=torch.bfloat16))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_against_cuda():
    report = ampcheck.compare_settings(Net(TorchTanh()).eval(), X, ampcheck.Setting(device="cuda"))
    assert len(report.comparison.modules) == 6


def test_the_picture_is_saved_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    report = ampcheck.compare_settings(Net(Coarse()).eval(), X, ampcheck.Setting(autocast=torch.bfloat16))
    png, svg = ampcheck.draw_errors(report.comparison, tmp_path / "errors.svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be written"):
        ampcheck.draw_errors(report.comparison, tmp_path / "nowhere" / "errors.png")


FACTORY = """
import torch
from faulty import Net, {kind}

def make():
    torch.manual_seed(0)
    return Net({kind}()).eval(), torch.ones(3, 6) / 3
def nothing():
    return 1
def twice():
    model, x = make()
    return model, (x, x)
def wide():
    model, x = make()
    return model.double(), x.double()
def far():
    model, x = make()
    return model, x.to("meta")
def more():
    model, x = make()
    model.head.register_forward_hook(lambda module, args, y: (y, y))
    return model, x
def chosen():
    return *more(), dict(outputs=lambda y: y[0])
def unknown():
    return *more(), dict(output=lambda y: y[0])
def owned():
    return *make(), dict(fail_on="error")
def seeded():
    return *make(), dict(seed=1, rtol=1e-4)
def twofold():
    return *make(), dict(seed=1), dict(seed=2)
def unnamed():
    return *make(), [1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    shutil.copy(sys.modules["faulty"].__file__, folder)
    for kind in ("NumpyTanh", "TorchTanh"):
        (folder / f"{kind.lower()}.py").write_text(FACTORY.format(kind=kind), encoding="utf-8")
    for kind in (NumpyTanh, TorchTanh):
        torch.manual_seed(0)
        model = Net(kind()).eval()
        torch.jit.save(exported(model, (torch.ones(3, 6) / 3,), "trace", folder), str(folder / f"{kind.__name__}.pt"))
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """``ampcheck compare`` in this process: exit status, standard output and standard error."""

    def run(*args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["ampcheck", "compare", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    yield run
    for module in ("numpytanh", "torchtanh"):
        sys.modules.pop(module, None)


def test_command_line_of_a_process(folder):
    started = [sys.executable, "-m", "ampcheck", "compare", "--json", "r.json", "--fail-on", "error"]
    done = subprocess.run(
        [*started, "numpytanh:make", "NumpyTanh.pt"], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 3, done.stderr
    assert "error[AMP602] constant-baked-into-trace" in done.stdout
    assert json.loads((folder / "r.json").read_text())["comparison"]["equal"] is False


def test_command_line(folder, command):
    pytest.importorskip("matplotlib")
    status, out, err = command("--figure", "f.png", "--fail-on", "warning", "torchtanh:make", "TorchTanh.pt")
    assert (status, err) == (0, "")
    assert "TorchScript trace against eager · equal" in out
    assert (folder / "f.svg").is_file()


@pytest.mark.parametrize("factory", ["torchtanh:chosen", "torchtanh:seeded"])
def test_options_of_a_factory(command, factory):
    status, _, err = command("--fail-on", "warning", factory, "TorchTanh.pt")
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("torchtanh:make", "none.pt"), "there is no file 'none.pt'"),
        (("torchtanh:nothing", "TorchTanh.pt"), "does not return a model and its inputs"),
        (("missing:make", "TorchTanh.pt"), "No module named 'missing'"),
        (
            ("torchtanh:twice", "TorchTanh.pt"),
            "the eager model does not take these inputs: too many positional arguments",
        ),
        (("torchtanh:wide", "TorchTanh.pt"), "the inputs are float64, and the TorchScript trace computes in float32"),
        (("torchtanh:far", "TorchTanh.pt"), "the inputs are on meta, and the eager model is on cpu"),
        (("torchtanh:more", "TorchTanh.pt"), "use the option `outputs`"),
        (("torchtanh:unknown", "TorchTanh.pt"), "gives an unknown option: output"),
        (("torchtanh:owned", "TorchTanh.pt"), "gives an unknown option: fail_on"),
        (("torchtanh:twofold", "TorchTanh.pt"), "more than a model, its inputs and one mapping of options"),
        (("torchtanh:unnamed", "TorchTanh.pt"), "more than a model, its inputs and one mapping of options"),
        (("--fail-on", "loud", "torchtanh:make", "TorchTanh.pt"), "fail_on must be"),
    ],
)
def test_command_line_bad_input(command, args, said):
    status, _, err = command(*args)
    assert status == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
