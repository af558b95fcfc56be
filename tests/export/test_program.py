"""`torch.export` programs: files, sizes, casts."""

from __future__ import annotations

import pytest
import torch
from export_forms import exported
from faulty import Net, TorchTanh
from test_faults import X, found
from torch.export import Dim

import ampcheck


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net(TorchTanh()).eval()


def test_a_saved_program_is_compared_module_by_module(model, tmp_path):
    torch.export.save(exported(model, (X,), "program", tmp_path), tmp_path / "model.pt2")
    report = ampcheck.compare(model, tmp_path / "model.pt2", X, trusted=True)
    assert report.findings == ()
    assert report.comparison.second == "torch.export program"
    assert [m.module for m in report.comparison.modules] == ["body.0", "body.1", "body.2", "body", "head", ""]


def test_sizes_that_the_program_claims_are_tried(model):
    program = torch.export.export(model, (X,), dynamic_shapes=({0: Dim("batch", max=8)},))
    report = ampcheck.compare(model, program, X)
    assert report.findings == ()
    assert "other sizes, 4×6" in report.comparison.inputs
    assert "other sizes, 4×6" not in ampcheck.compare(model, program, X, dynamic_batch=False).comparison.inputs


def test_keyword_inputs(model):
    program = torch.export.export(model, (), {"x": X})
    report = ampcheck.compare(model, program, {"x": X})
    assert report.findings == ()
    assert report.comparison.modules


def test_a_program_made_under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        program = torch.export.export(model, (X,))
    captured = found(ampcheck.compare(model, program, X)).get("AMP604")
    casts = [n for n in program.graph.nodes if "_to_copy" in str(n.target) or "aten.to" in str(n.target)]
    # Versions differ in whether an export records the casts of a region around it; what is recorded is told.
    assert (captured is not None) == bool(casts)


def test_other_weights_are_named_with_the_first_module(model):
    torch.manual_seed(1)
    other = Net(TorchTanh()).eval()
    other.body.load_state_dict(model.body.state_dict())
    report = ampcheck.compare(other, exported(model, (X,), "program", None), X)
    (finding,) = report.findings
    assert (finding.module, finding.evidence["reason"]) == ("head", "state-differs")
    assert report.comparison.first_module.module == "head"


def test_fresh_inputs_of_ones_own(model):
    program = exported(model, (X,), "program", None)
    report = ampcheck.compare(model, program, X, fresh_inputs=[X + 1, X * 2])
    assert report.comparison.inputs[1:3] == ("given inputs 1", "given inputs 2")
