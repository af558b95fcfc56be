"""AMP402 to AMP409 on hand-built traces: what PyTorch's own check passed."""

from __future__ import annotations

import dataclasses

import pytest
from rules.traces import ERROR, WARNING, findings, found, model, only, trace

from ampcheck.trace import GraphTrace, ModuleInfo, Site, StaleTensor, Trace, UncheckedSave, Write

SAVE = Site("/work/model.py", 40, "forward", "x = scores.softmax(-1)", "save", "net.attention", node="SoftmaxBackward0")
WRITE = Site("/work/model.py", 41, "forward", "x.data[mask] = 0", "write", "net.mask", "aten::index_put_")
STEP = Site("/work/train.py", 30, "main", "optimizer.step()", "write")
BROADCAST = Site("/work/train.py", 20, "main", "b = model(second)", "write")
HOOKS = Site("/work/train.py", 8, "main", "with saved_tensors_hooks(pack, unpack):")
UNTRACKED = StaleTensor(
    node="SoftmaxBackward0",
    slot="result",
    dtype="float16",
    shape=(8, 64),
    op="aten::_softmax",
    save=SAVE,
    writes=(Write("aten::index_put_", WRITE),),
    version_saved=0,
    version_found=0,
    silent="untracked",
)
UPDATED = dataclasses.replace(
    UNTRACKED,
    node="MmBackward0",
    slot="mat2",
    op="aten::mm",
    writes=(Write("aten::add_", STEP, by="optimizer"),),
    name="net.head.weight",
)
REWRITTEN = dataclasses.replace(
    UNTRACKED,
    node="MulBackward0",
    slot="other",
    op="aten::mul",
    writes=(Write("aten::copy_", WRITE),),
    name="net.attention.mask",
    buffer=True,
)
UNCHECKED = UncheckedSave("SoftmaxBackward0", SAVE, HOOKS)


def ran(*stale: StaleTensor, **facts: object) -> Trace:
    """A watched step with one backward pass, which met these stale tensors."""
    return trace(graph=GraphTrace(**{"stale": stale, "backwards": (Site("/work/train.py", 25, "main"),), **facts}))


PAIRS = (
    ("AMP402", ran(UNTRACKED), ran(UPDATED)),
    ("AMP405", ran(UPDATED), ran(UNTRACKED)),
    ("AMP407", ran(REWRITTEN), ran(dataclasses.replace(REWRITTEN, buffer=False))),
    ("AMP409", ran(unchecked=(UNCHECKED,)), ran(UNTRACKED)),
)


def test_a_healthy_step_has_no_findings():
    assert found(ran()) == {}


@pytest.mark.parametrize("stale", [UNTRACKED, UPDATED, REWRITTEN])
def test_a_tensor_that_pytorch_checks_is_its_failures(stale):
    assert found(ran(dataclasses.replace(stale, silent=None, version_found=1))) == {}


class TestSavedTensorModifiedSilently:
    def test_through_an_alias(self):
        finding = only(ran(UNTRACKED))
        assert (finding.code, finding.severity, finding.module) == ("AMP402", ERROR, "net.mask")
        assert finding.message == (
            "The output of softmax was overwritten before backward used it, through `.data` or another alias with its "
            "own version counter, so PyTorch does not notice."
        )
        assert [(str(site), site.role) for site in finding.sites] == [("model.py:41", "write"), ("model.py:40", "save")]
        assert finding.evidence == {
            "dtype": "float16",
            "shape": [8, 64],
            "version_saved": 0,
            "version_found": 0,
            "node": "SoftmaxBackward0",
            "slot": "result",
            "how": "untracked",
        }
        assert finding.fix == "Write to a copy: insert the line `x = x.clone()` before model.py:41."

    def test_under_hooks(self):
        finding = only(ran(dataclasses.replace(UNTRACKED, silent="hooks")))
        assert finding.message == (
            "The output of softmax was overwritten before backward used it, and saved-tensor hooks keep PyTorch from "
            "noticing."
        )
        assert finding.evidence["how"] == "hooks"

    def test_from_outside(self):
        finding = only(ran(dataclasses.replace(UNTRACKED, silent="outside", writes=())))
        assert finding.message == (
            "The output of softmax was overwritten before backward used it, from outside PyTorch (a NumPy array that "
            "shares its memory, say), so PyTorch does not notice."
        )
        assert (finding.module, finding.sites) == ("net.attention", (SAVE,))
        assert finding.fix == "Give NumPy a copy: `x.detach().cpu().numpy().copy()`."

    def test_by_a_custom_function(self):
        finding = only(ran(dataclasses.replace(UNTRACKED, node="ScaleBackward", op=None, silent="unmarked")))
        assert finding.message == (
            "ScaleBackward overwrote its input without `ctx.mark_dirty`, and the input was used again at model.py:40: "
            "its gradient ignores the write."
        )
        assert finding.fix.startswith("Call `ctx.mark_dirty(x)` in `forward` for each input `x` that it writes to")

    def test_write_that_was_not_seen(self):
        finding = only(ran(dataclasses.replace(UNTRACKED, writes=())))
        assert (finding.module, finding.sites) == ("net.attention", (SAVE,))
        assert finding.fix == (
            "Use the out-of-place operation, or move the write ahead of the first use of the value in the forward pass."
        )

    @pytest.mark.parametrize(
        ("facts", "what"),
        [
            ({"slot": "self"}, "A tensor saved by softmax was"),
            ({"name": "net.scale"}, "The parameter net.scale, saved by softmax, was"),
            ({"op": None}, "The output of Softmax was"),
            ({"node": "ScaleBackward", "op": None, "slot": "x"}, "A tensor saved by Scale was"),
        ],
        ids=["input", "parameter", "op not seen", "custom function"],
    )
    def test_the_tensor_is_named(self, facts, what):
        assert only(ran(dataclasses.replace(UNTRACKED, **facts))).message.startswith(what)

    def test_one_write_is_one_finding(self):
        twin = dataclasses.replace(UNTRACKED, node="AliasBackward0", slot="self")
        finding = only(ran(UNTRACKED, twin))
        assert finding.evidence["also_stale"] == [
            {
                "node": "AliasBackward0",
                "slot": "self",
                "module": "net.attention",
                "saved_at": "model.py:40",
                "written_at": ["model.py:41"],
            }
        ]

    @pytest.mark.parametrize(
        "other",
        [{"silent": "hooks"}, {"save": dataclasses.replace(SAVE, line=50)}],
        ids=["in another way", "saved elsewhere"],
    )
    def test_several_faults_are_several_findings(self, other):
        assert [finding.code for finding in findings(ran(UNTRACKED, dataclasses.replace(UNTRACKED, **other)))] == [
            "AMP402",
            "AMP402",
        ]

    def test_three_lines_that_wrote_are_named(self):
        lines = [dataclasses.replace(WRITE, line=line) for line in (41, 41, 42, 43, 44)]
        again = dataclasses.replace(UNTRACKED, writes=tuple(Write("aten::add_", line) for line in lines))
        assert [site.line for site in only(ran(again)).sites] == [41, 42, 43, 40]

    def test_lines_of_libraries_are_evidence(self):
        inside = Site("/venv/timm/layers/drop.py", 7, "drop_path")
        stale = dataclasses.replace(UNTRACKED, library=inside, writes=(Write("aten::mul_", WRITE, library=inside),))
        evidence = only(ran(stale)).evidence
        assert evidence["saved_in"] == evidence["written_in"] == "/venv/timm/layers/drop.py:7"

    @pytest.mark.parametrize(
        ("code", "fix"),
        [
            ("x = F.dropout(x, 0.1, inplace=True)", "Write `x = F.dropout(x, 0.1)` at model.py:41."),
            ("x.data += y  # residual", "Write `x = x + y` at model.py:41."),
            ("x.data *= y - 1", "Write `x = x * (y - 1)` at model.py:41."),
            ("x.data[0] += y", "Write to a copy: insert the line `x = x.clone()` before model.py:41."),
            ("x.data.mul_(y)", "Write `x = x.mul(y)` at model.py:41."),
            ("torch._foreach_add_(xs, ys)", "Write `xs = torch._foreach_add(xs, ys)` at model.py:41."),
            ("torch.mul(x, y, out=x.data)", "Write `x = torch.mul(x, y)` at model.py:41."),
            ("self.act(x)", "Use the out-of-place operation at model.py:41, or write to a copy: `.clone()`."),
            ("x.data.zero_()", "Write to a copy: insert the line `x = x.clone()` before model.py:41."),
        ],
    )
    def test_the_line_that_writes_is_reworded(self, code, fix):
        write = Write("aten::mul_", dataclasses.replace(WRITE, code=code), shape=UNTRACKED.shape)
        finding = only(ran(dataclasses.replace(UNTRACKED, writes=(write,))))
        assert finding.fix == fix
        if finding.edit is not None:
            assert (finding.edit.line, finding.edit.before) == (41, code)
            assert finding.edit.after.partition("\n")[0].split("  #")[0] in fix

    @pytest.mark.parametrize(
        ("code", "fix"),
        [
            (
                "x = self.mask(x)",
                "Build the ReLU `net.mask` with `inplace=False`, or write `x = self.mask(x",
            ),
            ("x = self.body(x)", "Build the ReLU `net.mask` with `inplace=False`."),
        ],
    )
    def test_an_activation_is_named(self, code, fix):
        write = Write("aten::relu_", dataclasses.replace(WRITE, code=code), shape=UNTRACKED.shape)
        network = dataclasses.replace(model(), modules=(ModuleInfo("net.mask", "ReLU"),))
        judged = dataclasses.replace(ran(dataclasses.replace(UNTRACKED, writes=(write,))), model=network)
        finding = next(one for one in findings(judged) if one.code == "AMP402")
        assert finding.fix.startswith(fix)

    def test_what_writes_to_a_parameter_means_to(self):
        write = Write("aten::clamp_", dataclasses.replace(WRITE, code="p.data.clamp_(-1, 1)"))
        finding = only(ran(dataclasses.replace(UNTRACKED, name="conv.weight", writes=(write,))))
        assert finding.fix.startswith("Move the write to conv.weight at model.py:41 after the `backward()`")
        assert finding.edit is None

    def test_write_to_a_whole_tensor_of_a_list(self):
        line = dataclasses.replace(WRITE, code="levels[i] += up")
        whole = dataclasses.replace(UNTRACKED, writes=(Write("aten::add_", line, shape=UNTRACKED.shape),))
        assert only(ran(whole)).fix == "Write `levels[i] = levels[i] + up` at model.py:41."

    def test_writes_of_others_are_other_rules(self):
        assert found(ran(UPDATED)) == {"AMP405": ERROR}
        assert found(ran(REWRITTEN)) == {"AMP407": ERROR}


class TestParametersUpdatedBeforeBackward:
    def test_past_the_version_counter(self):
        finding = only(ran(UPDATED))
        assert (finding.code, finding.severity, finding.module) == ("AMP405", ERROR, "net.attention")
        assert finding.message == (
            "The optimizer step at train.py:30 changed net.head.weight between the forward pass that saved it at "
            "model.py:40 and its backward. The step bypasses the version counter, so PyTorch says nothing."
        )
        assert finding.sites == (STEP, SAVE)
        assert finding.evidence["parameters"] == ["net.head.weight"]
        assert finding.evidence["tensor"] == "net.head.weight"
        assert finding.fix == (
            "Run the backward pass before the step at train.py:30, or run the forward pass at model.py:40 again after "
            "it."
        )

    def test_all_parameters_are_one_finding(self):
        stem = dataclasses.replace(UPDATED, name="net.stem.weight")
        finding = only(ran(UPDATED, stem, stem))
        assert "changed net.head.weight and net.stem.weight between the forward pass that saved them" in finding.message
        assert finding.evidence["parameters"] == ["net.head.weight", "net.stem.weight"]
        assert len(finding.evidence["also_stale"]) == 2

    def test_parameters_without_a_name(self):
        finding = only(ran(dataclasses.replace(UPDATED, name=None, save=None)))
        assert "changed parameters between the forward pass that saved them and its backward." in finding.message
        assert (finding.module, finding.sites) == (None, (STEP,))

    def test_other_stale_tensors_are_not_counted(self):
        seen = {finding.code: finding for finding in findings(ran(UPDATED, UNTRACKED))}
        assert seen.keys() == {"AMP402", "AMP405"}
        assert "also_stale" not in seen["AMP405"].evidence

    def test_the_step_is_named_where_others_wrote_before_it(self):
        writes = Write("aten::mul_", WRITE), *UPDATED.writes
        finding = only(ran(dataclasses.replace(UPDATED, writes=writes)))
        assert finding.message.startswith("The optimizer step at train.py:30 changed net.head.weight")

    def test_write_by_the_code(self):
        by_hand = dataclasses.replace(UPDATED, writes=(Write("aten::add_", STEP),))
        assert found(ran(by_hand)) == {"AMP402": ERROR}


class TestBuffersRewrittenBetweenForwards:
    def test_by_the_module_itself(self):
        finding = only(ran(REWRITTEN))
        assert (finding.code, finding.severity, finding.module) == ("AMP407", ERROR, "net.attention")
        assert finding.message == (
            "The buffer net.attention.mask, saved by MulBackward0 at model.py:40, was overwritten by copy_ at "
            "model.py:41 before backward used it, and PyTorch does not notice."
        )
        assert finding.sites == (WRITE, SAVE)
        assert finding.evidence["tensor"] == "net.attention.mask"
        assert finding.fix == "Use `self.mask.clone()` at model.py:40."

    def test_by_the_broadcast_of_data_parallel_training(self):
        sent = Write("c10d::broadcast_", BROADCAST, by="buffer-broadcast")
        finding = only(ran(dataclasses.replace(REWRITTEN, writes=(sent,))))
        assert "was overwritten by the buffer broadcast of DistributedDataParallel at train.py:20" in finding.message
        assert finding.fix == (
            "Use `self.mask.clone()` at model.py:40, or build DistributedDataParallel with `broadcast_buffers=False`."
        )

    def test_broadcast_to_a_buffer_without_a_name(self):
        sent = Write("c10d::broadcast_", BROADCAST, by="buffer-broadcast")
        finding = only(ran(dataclasses.replace(REWRITTEN, writes=(sent,), name=None, buffer=False)))
        assert finding.message.startswith("A buffer, saved by MulBackward0 at model.py:40, was overwritten by the")
        assert finding.module is None
        assert finding.fix.startswith("Use `buffer.clone()` at model.py:40, or")

    def test_write_that_was_not_seen(self):
        finding = only(ran(dataclasses.replace(REWRITTEN, writes=())))
        assert "saved by MulBackward0 at model.py:40, was overwritten before backward used it" in finding.message

    def test_several_buffers_are_one_finding(self):
        finding = only(ran(REWRITTEN, dataclasses.replace(REWRITTEN, slot="self")))
        assert [other["slot"] for other in finding.evidence["also_stale"]] == ["self"]

    def test_no_buffer(self):
        assert found(ran(dataclasses.replace(REWRITTEN, buffer=False))) == {"AMP402": ERROR}


class TestSavedTensorHooksWithoutCheck:
    def test_handed_back_as_it_was(self):
        finding = only(ran(unchecked=(UNCHECKED,)))
        assert (finding.code, finding.severity, finding.module) == ("AMP409", WARNING, "net.attention")
        assert finding.message == (
            "Saved-tensor hooks at train.py:8 switch off PyTorch's version check: they return the tensor that "
            "SoftmaxBackward0 saved at model.py:40 without a copy."
        )
        assert finding.sites == (SAVE, HOOKS)
        assert finding.evidence == {"node": "SoftmaxBackward0"}

    def test_where_it_was_saved_is_not_known(self):
        finding = only(ran(unchecked=(UncheckedSave("SoftmaxBackward0", None, None),)))
        assert (finding.module, finding.sites) == (None, ())
        assert finding.message.startswith("Saved-tensor hooks switch off PyTorch's version check: they return")

    def test_each_is_a_finding(self):
        assert [finding.code for finding in findings(ran(unchecked=(UNCHECKED, UNCHECKED)))] == ["AMP409", "AMP409"]
