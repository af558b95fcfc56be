"""Sharded models: what their mixed precision policies ask for against what runs, on two processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed.fsdp
from launch import HERE, launched

# Before 2.6 `fully_shard` takes a CUDA device for granted.
pytestmark = pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this PyTorch shards on CUDA alone"
)

SOUND = [
    "layers",
    "policy",
    "float32",
    "float32-block",
    "autocast",
    "autocast-and-policy",
    "wrapper",
    "flat-wrapper",
]
OUTSIDE = {"root-without": ["stem", "head"], "block-without": ["blocks.1.norm", "blocks.1.fc"]}
POLICY = "MixedPrecisionPolicy(param_dtype=torch.bfloat16)"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    directory = tmp_path_factory.mktemp("sharded")
    done = launched(HERE / "sharded_steps.py", "found", cwd=directory)
    assert done.returncode == 0, done.stderr
    return [json.loads((directory / f"found.{rank}").read_text()) for rank in range(2)]


def test_every_case_is_a_test(ranks: list[dict[str, Any]]) -> None:
    tested = {*SOUND, *OUTSIDE, "other-autocast", "block-without-dies", "inputs-not-cast", "overwritten"}
    assert {name for name in ranks[0] if not name.startswith("bare-")} == tested


@pytest.mark.parametrize("case", SOUND)
def test_what_is_sound_gives_no_finding(ranks: list[dict[str, Any]], case: str) -> None:
    assert [rank[case]["findings"] for rank in ranks] == [[], []]
    assert [rank[case]["raised"] for rank in ranks] == ["", ""]
    assert ranks[0][case]["said"].count("no findings") == 2


@pytest.mark.parametrize("case", ["policy", "wrapper", "flat-wrapper"])
def test_the_policy_is_what_was_asked_for(ranks: list[dict[str, Any]], case: str) -> None:
    assert ranks[0][case]["precision"] == "mixed bfloat16 on cpu by a sharding policy, loss scaling off"


def test_the_first_step_is_told_with_its_parameters(ranks: list[dict[str, Any]]) -> None:
    said = ranks[0]["policy"]["said"]
    assert "watched training step · 11 module calls, none under autocast, 6 with bfloat16 parameters" in said


@pytest.mark.parametrize("case", OUTSIDE)
def test_modules_without_the_policy_are_named(ranks: list[dict[str, Any]], case: str) -> None:
    (finding,) = ranks[0][case]["findings"]
    assert (finding["code"], finding["severity"]) == ("AMP111", "warning")
    assert finding["evidence"]["modules"] == OUTSIDE[case]
    assert finding["evidence"]["computed"] == ["float32"]
    assert "is sharded without a policy; 4 calls had bfloat16 parameters." in finding["message"]


def test_autocast_in_another_dtype_than_the_policy(ranks: list[dict[str, Any]]) -> None:
    findings = {finding["code"]: finding for finding in ranks[0]["other-autocast"]["findings"]}
    assert findings["AMP104"]["severity"] == "error"
    assert findings["AMP104"]["message"].startswith(f"bfloat16 was asked for by {POLICY}, but 11 module calls")
    assert "AMP402" not in findings


@pytest.mark.parametrize(
    ("case", "why", "fix"),
    [
        ("block-without-dies", "`blocks.1` is sharded without a policy", "Pass the `mp_policy=` of the rest"),
        ("inputs-not-cast", "cast_forward_inputs=False does not cast its inputs", "Remove `cast_forward_inputs=False`"),
    ],
)
def test_a_crash_is_explained_by_the_policy(ranks: list[dict[str, Any]], case: str, why: str, fix: str) -> None:
    for rank in ranks:
        finding = next(finding for finding in rank[case]["findings"] if finding["code"] == "AMP203")
        assert finding["evidence"]["reason"] == "sharding-policy"
        assert why in finding["message"]
        assert finding["fix"].startswith(fix)
        assert "must have the same dtype" in rank[case]["raised"]


def test_an_overwritten_tensor_is_still_found(ranks: list[dict[str, Any]]) -> None:
    """Gathering parameters anew is no write; what the model does is."""
    assert [finding["code"] for finding in ranks[0]["overwritten"]["findings"]] == ["AMP401"]


def test_one_rank_speaks(ranks: list[dict[str, Any]]) -> None:
    assert {case: seen["said"] for case, seen in ranks[1].items() if seen["said"]} == {}


def test_neither_a_collective_nor_a_bit_is_added(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        bare, checked = rank["bare-policy"], rank["policy"]
        assert (bare["findings"], bare["collectives"] > 0) == ([], True)
        assert (checked["collectives"], checked["loss"]) == (bare["collectives"], bare["loss"])
