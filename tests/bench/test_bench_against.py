"""`python bench/ calls --against`: what is counted, and that the record says no more than at its commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.guards import RESULTS, against, host


def test_clip_loss_of_64_rows_takes_no_more_instructions_than_at_the_commit_of_the_record() -> None:
    record = json.loads((RESULTS / "against.json").read_text())
    assert record["commit"] == "2132c87"
    hosts = {f"host: {case}" for case in against.cases() if case.endswith(" 512")}
    assert record["ratios"].keys() == against.cases().keys() | hosts
    assert max(record["ratios"].values()) <= 1


def test_the_cases_are_a_loss_with_a_graph_one_without_and_gradients() -> None:
    cases = against.cases()
    assert cases["forward 256"]().requires_grad
    assert not cases["forward, no_grad 256"]().requires_grad
    dx, dy, dscale = cases["forward and backward 512"]()
    assert dx.shape == dy.shape == (64, 512) and dscale.shape == torch.Size([])


@pytest.mark.parametrize(("theirs", "status"), [(90, 1), (100, 0)])
def test_more_instructions_than_there_are_told(
    theirs: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against, "_counted", lambda tree: {"forward 256": 100 if tree == host.ROOT else theirs})
    assert against.main(Path("elsewhere"), update=False) == status
    assert f"{100 / theirs:.3f}" in capsys.readouterr().out
