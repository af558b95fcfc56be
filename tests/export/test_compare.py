"""What counts as equal, and how modules of both models are matched."""

from __future__ import annotations

import pytest
import torch
from export_forms import exported
from faulty import NumpyTanh, TorchTanh
from test_faults import X, found, marked, traced
from torch import nn

import ampcheck
from ampcheck.export.values import Tolerances, distance


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.act = act

    def forward(self, x):
        return self.act(self.linear(x))


class Shared(nn.Module):
    """One activation in every block, and one block under two names."""

    def __init__(self, act, blocks=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(act) for _ in range(blocks))
        self.again = self.blocks[0]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.again(x)


CALLS = [("blocks.0.act", 0), ("blocks.0.act", 1), ("blocks.0.act", 2), ("blocks.0.act", 3)]


@pytest.mark.parametrize("form", ["trace", "file", "program", "onnx", "onnx-legacy"])
def test_a_module_with_several_parents(form, tmp_path):
    if form.startswith("onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = Shared(nn.SiLU()).eval()
    export = exported(model, (X,), "trace" if form == "file" else form, tmp_path)
    if form == "file":
        torch.jit.save(export, str(tmp_path / "model.pt"))
        export = tmp_path / "model.pt"
    report = ampcheck.compare(model, export, X)
    assert report.findings == ()
    assert report.comparison.unseen is None
    seen = [(m.module, m.call) for m in report.comparison.modules]
    assert [call for call in seen if call[0] == "blocks.0.act"] == CALLS
    assert {"blocks.0", "blocks.1", "blocks.2", "blocks.1.linear", ""} <= {module for module, _ in seen}


def test_a_module_with_several_parents_that_leaves_the_dispatcher():
    model = Shared(NumpyTanh(), blocks=2).eval()
    report = ampcheck.compare(model, traced(model), X)
    findings = found(report)
    assert findings["AMP602"].module == findings["AMP601"].module == "blocks.0.act"
    first = report.comparison.first_module
    assert (first.module, first.call, first.inputs_equal) == ("blocks.0.act", 0, True)


class Convolutional(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(3, 4, 3))
        self.stem.add_module("norm", nn.BatchNorm2d(4))
        self.middle = middle
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))


class Folded(Convolutional):
    """What an exporter makes of it: the normalization is in the convolution's weights."""

    def __init__(self, model):
        super().__init__(model.middle)
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.utils.fuse_conv_bn_eval(model.stem.conv, model.stem.norm))
        self.head = model.head


@pytest.mark.parametrize(("middle", "culprit"), [(TorchTanh, None), (NumpyTanh, "middle")])
def test_a_folded_normalization_is_no_difference(middle, culprit):
    model = Convolutional(middle()).eval()
    model.stem.norm.running_mean.uniform_(-1, 1)
    model.stem.norm.running_var.uniform_(0.5, 2)
    images = torch.rand(1, 3, 8, 8)
    report = ampcheck.compare(model, traced(Folded(model).eval(), images), images)
    first = report.comparison.first_module
    assert (first.module if first else None) == culprit
    assert set(found(report)) == (set() if culprit is None else {"AMP601", "AMP602"})
    assert not any("state-differs" in str(finding.evidence) for finding in report.findings)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x):
        y = self.body(x)
        return {"logits": y, "given": x + 1, "twice": y * 2}


class Logits(Auxiliary):
    def forward(self, x):
        return super().forward(x)["logits"]


def test_an_export_of_some_of_the_outputs():
    model, smaller = Auxiliary().eval(), Logits().eval()
    smaller.load_state_dict(model.state_dict())
    export = traced(smaller)
    with pytest.raises(ValueError, match=r"returns 3 tensors .* 1 .*; use the option `outputs`"):
        ampcheck.compare(model, export, X)
    report = ampcheck.compare(model, export, X, outputs=lambda y: y["logits"])
    assert report.findings == ()
    assert [output.shape for output in report.comparison.outputs] == [(3, 6)]
    with pytest.raises(ValueError, match="`outputs` fails on what the eager model returns: 'scores'"):
        ampcheck.compare(model, export, X, outputs=lambda y: y["scores"])
    with pytest.raises(ValueError, match="`outputs` returns no tensor"):
        ampcheck.compare(model, export, X, outputs=lambda y: None)


def test_an_export_of_a_mapping():
    model = Auxiliary().eval()
    with torch.no_grad():
        export = torch.jit.trace(model, (X,), strict=False, check_trace=False)
    assert ampcheck.compare(model, export, X).findings == ()


@pytest.mark.parametrize("layout", [(1, 84, 50), (1, 50, 84), (50, 84)])
def test_scores_beside_boxes_are_held_to_their_own_size(layout):
    channel = layout.index(84)
    eager = torch.rand(layout)
    eager.narrow(channel, 0, 4).mul_(600)
    boxes, scores, rounding = eager.clone(), eager.clone(), eager * (1 + 3e-7)
    boxes.narrow(channel, 0, 4).add_(1e-3)
    scores.narrow(channel, 4, 80).add_(2e-3)
    tolerances = Tolerances("torch")
    assert distance(eager, boxes, tolerances).equal
    assert distance(eager, rounding, tolerances).equal
    apart = distance(eager, scores, tolerances)
    assert not apart.equal
    assert apart.relative == pytest.approx(2e-3, rel=0.1)


class Sorted(nn.Module):
    """The best two of scores that tie, and the places they were found at."""

    def __init__(self, last_first):
        super().__init__()
        self.score = nn.Linear(6, 6)
        self.last_first = last_first
        nn.init.zeros_(self.score.weight)
        nn.init.ones_(self.score.bias)

    def forward(self, x):
        scores = self.score(x)
        if self.last_first:
            scores, places = scores.flip(-1).topk(2)
            return torch.cat([scores, 5.0 - places], -1)
        scores, places = scores.topk(2)
        return torch.cat([scores, places.to(scores.dtype)], -1)


@pytest.mark.parametrize(("scores", "severity"), [("tie", "warning"), ("apart", "error")])
def test_an_order_that_rounding_decides_is_no_difference(scores, severity):
    model, other = Sorted(False).eval(), Sorted(True).eval()
    if scores == "apart":
        for each in (model, other):
            each.score.bias.data.copy_(torch.arange(6.0))
        other.last_first = False
        other.score.bias.data[0] = 9.0
    (finding,) = ampcheck.compare(model, traced(other), X).findings
    assert (finding.code, str(finding.severity)) == ("AMP601", severity)
    assert (finding.evidence["reason"] == "unsettled") is (scores == "tie")


class Kept(nn.Module):
    """Boxes in pixels, each with a confidence below one, in the order of scores that tie."""

    def __init__(self, kept=None, confidence=0.5):
        super().__init__()
        self.score, self.box = nn.Linear(6, 1), nn.Linear(6, 4)
        self.kept, self.confidence = kept, confidence
        nn.init.zeros_(self.score.weight)

    def forward(self, x):
        boxes = 640 * self.box(x)
        if x.mean() > 0.5:
            boxes = boxes * 3 + 1
        rows = torch.cat([boxes, torch.full_like(boxes[:, :1], self.confidence)], 1)
        return rows[self.score(x)[:, 0].argsort()][: self.kept]


@pytest.mark.parametrize("kept", [None, 10])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_order_that_rounding_decides_excuses_no_other_branch(kept):
    model, x = Kept(kept).eval(), torch.rand(40, 6) * 0.9
    report = ampcheck.compare(model, traced(model, x), x, fresh_inputs=[x + 0.5])
    finding = report.findings[0]
    assert (str(finding.severity), finding.evidence["reason"]) == ("error", "data-dependent")
    assert finding.sites[0].line == marked(Kept, "x.mean()")
    assert "without effect" not in str(report)
    if kept is None:
        assert not report.comparison.equal


@pytest.mark.parametrize(("confidence", "equal"), [(0.5, True), (0.502, False)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_values_are_compared_whatever_their_order(confidence, equal):
    model, other = Kept().eval(), Kept(confidence=confidence).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.score.weight.normal_(0, 1e-6)
    x = torch.rand(40, 6) * 0.2
    report = ampcheck.compare(model, traced(other, x), x)
    assert report.comparison.equal is equal
    assert report.comparison.outputs[0].relative > 0.01


class Halving(nn.Module):
    """Takes images whose sides are even."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 3, 3, stride=2, padding=1)

    def forward(self, x):
        return x + nn.functional.interpolate(self.down(x), scale_factor=2)


def test_a_model_that_refuses_one_pixel_more_is_tried_with_twice_as_many(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, images = Halving().eval(), torch.rand(1, 3, 8, 8)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (images,), str(file), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "b", 2: "h", 3: "w"}}
    )
    report = ampcheck.compare(model, file, images)
    assert report.findings == ()
    assert "other sizes, 2×3×16×16" in report.comparison.inputs


def test_inputs_that_a_model_writes_to_are_put_before_it_anew():
    class Writing(nn.Module):
        def forward(self, x):
            return x.mul_(2) + 1

    model = Writing().eval()
    given = X.clone()
    report = ampcheck.compare(model, traced(model, X.clone()), given)
    assert report.findings == ()
    assert report.comparison.modules[0].inputs_equal
    assert torch.equal(given, X)
