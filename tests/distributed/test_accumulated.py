"""`accumulate` over ranks: DDP and FSDP2 send gradients once a step, and they are those of the step without parts."""

from __future__ import annotations

import accumulated_runs
import pytest


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_gradients_are_those_without_parts_and_sent_as_often(ranks, how):
    for found in ranks.run(accumulated_runs.compared, 2, how):
        assert found["parted"] == found["plain"] > 0, found
        assert max(found["errors"].values()) < 1e-5, found["errors"]


def test_two_modules_in_ddp_have_the_gradients_of_all_rows(ranks):
    assert max(ranks.run(accumulated_runs.whole_batch, 2)) < 1e-5


def test_the_callers_no_sync_holds(ranks):
    assert all(ranks.run(accumulated_runs.outer_no_sync, 2))
