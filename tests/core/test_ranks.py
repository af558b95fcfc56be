"""Ranks that are slow to say what they found: nothing is said of them, and nothing is told twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ampcheck import AmpChecker, Finding, Severity
from ampcheck.report.ranks import merged_findings

FINDING = Finding("AMP301", "no-scaler", Severity.WARNING, "No scaler.")


@pytest.mark.parametrize(
    ("having", "heard", "where"),
    [
        ([0, 1, 2], [0, 1, 2], ""),
        ([1, 2], [0, 1, 2], " (seen on ranks 1, 2 only)"),
        ([0], [0], ""),
        ([0], [0, 1], " (seen on rank 0)"),
        ([1], [0], " (seen on rank 1)"),
        ([1, 2], [0], " (seen on ranks 1, 2 only)"),
    ],
)
def test_nothing_is_said_of_ranks_that_were_not_heard(
    monkeypatch: pytest.MonkeyPatch, having: list[int], heard: list[int], where: str
) -> None:
    """All were heard at an earlier stage, and ``heard`` now."""
    monkeypatch.setattr("ampcheck.report.ranks.world_size", lambda: 3)
    findings = {rank: (FINDING,) if rank in having else () for rank in range(3)}
    ((finding, telling),) = merged_findings(findings, heard)
    assert finding == FINDING
    assert telling.message == f"No scaler.{where}"


@pytest.mark.parametrize("late", [True, False], ids=["it has it too", "it has none"])
def test_what_a_slow_rank_says_later_is_not_told_again(monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    said: list[str] = []

    def gather(stage: str, mine: tuple[Finding, ...]) -> dict[int, tuple[Finding, ...]]:
        return {0: mine} | {"fit start": {1: ()}, "training": {}, "evaluation": {1: mine if late else ()}}[stage]

    monkeypatch.setattr("ampcheck.report.teller.gather", gather)
    model, batch = nn.Linear(3, 2), torch.ones(1, 3)
    checker = AmpChecker(select="AMP301", report=False)
    checker.attach(model, emit=said.append)
    for phase in (checker.training_step, checker.evaluation_step):
        with phase(), torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch).sum()
            if phase == checker.training_step:
                loss.backward()
    blocks = [text for text in said if "AMP301]" in text]
    assert len(blocks) == 1
    assert "seen on" not in blocks[0]
    assert checker.report is not None
    ends = [finding.message.endswith("(seen on rank 0)") for finding in checker.report.findings]
    assert ends == [not late]
