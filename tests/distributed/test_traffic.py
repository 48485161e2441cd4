"""What losses over several ranks send and hold, and the cost model that says so beforehand."""

from __future__ import annotations

import pytest
import sharded
import sharded_runs
import torch

import cibr_kernels as ck
from bench.experiments import scale
from bench.experiments import sharded as measured


# ------------------------------------------------------------------------------------- bytes and memory
@pytest.mark.parametrize(("dtype", "size", "summed"), [(torch.float32, 4, 4), (torch.bfloat16, 2, 4)], ids=str)
@pytest.mark.parametrize("world", [2, 4])
def test_traffic_is_what_the_documentation_says(ranks, world, dtype, size, summed):
    n, d, others = 8, 16, world - 1
    for forward, backward in ranks.run(sharded_runs.meters, world, n, d, dtype, "gather", "clip"):
        header = {"header": (1, others * 256)}
        assert forward == header | {"all-gather": (1, others * n * d * size), "all-to-all": (1, others * n * 4)}
        assert backward == {"all-to-all": (1, others * n * 4), "reduce-scatter": (1, others * n * d * summed)}
    for forward, backward in ranks.run(sharded_runs.meters, world, n, d, dtype, "ring", "clip"):
        assert forward == header | {
            "ring ahead": (others, others * n * d * size),
            "ring behind": (world, world * n * 8),
        }
        ahead = others * n * (d * size + 2 * 4)
        assert backward == {"ring ahead": (3 * others, ahead), "ring behind": (world, world * n * d * summed)}
    if dtype == torch.float32:
        for forward, backward in ranks.run(sharded_runs.meters, world, n, d, dtype, "gather", "critic"):
            projection = others * n * sharded.HIDDEN * 4
            assert forward == header | {"all-gather": (2, projection + others * 16)}
            assert backward == {"reduce-scatter": (2, projection + others * 16)}


def test_ring_makes_nothing_that_grows_with_the_number_of_ranks(ranks):
    n, d = 40, 16
    local = {world: max(ranks.run(sharded_runs.largest, world, n, d, "ring")) for world in (2, 3, 4)}
    assert set(local.values()) == {n * d}
    assert max(ranks.run(sharded_runs.largest, 4, n, d, "gather")) == 4 * n * d


def test_headers_are_exchanged_at_every_call_or_at_the_first(ranks):
    assert ranks.run(sharded_runs.headers, 2) == [(2, 1, 1)] * 2
    with pytest.raises(ValueError, match="known are 'every call', 'first call'"):
        ck.distributed.set_header_check("never")


# ------------------------------------------------------------------------------------- the cost model
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_cost_models_bytes_are_those_of_the_ranks(ranks, world, strategy, loss):
    for forward, backward in ranks.run(sharded_runs.meters, world, 8, 16, torch.float32, strategy, loss):
        counted = [sum(size for _, size in meter.values()) for meter in (forward, backward)]
        expected = scale.bytes_of(strategy, 8, world, 16, 4, loss=loss)
        assert counted == [expected[0] + scale.header_bytes(world), expected[1]]


@pytest.mark.parametrize("name", [name for name, i in measured.IMPLEMENTATIONS.items() if not i.environment])
def test_the_side_by_side_measures_gradients_and_bytes(ranks, name):
    """Of ours, and of others: open_clip's losses without gather_with_grad are known to be wrong, and inf_cl's scale."""
    pytest.importorskip(measured.IMPLEMENTATIONS[name].package)
    for ratios, moved in ranks.run(sharded_runs.side_by_side, 4, name, 8, 4):
        exact = {what: ratio for what, ratio in ratios.items() if not what.endswith("off")}
        assert len(exact) == {"clip": 3, "siglip": 4}[measured.IMPLEMENTATIONS[name].loss]
        if "no grad" in name:
            assert exact["image"] < 0.6 and exact["text"] < 0.6
        elif name != "inf_cl cal_ring_loss":
            assert exact == pytest.approx(dict.fromkeys(exact, 1.0), abs=2e-6), exact
            assert max(ratios["image off"], ratios["text off"]) < 1e-5
        if name.startswith(("clip_loss", "siglip_loss")):
            loss, strategy = name.split("_")[0], name.split(", ")[1]
            assert [moved["forward"], moved["backward"]] == list(scale.bytes_of(strategy, 8, 4, 4, 4, loss=loss))
            assert moved["counted"] == moved["wire"]


def test_the_cost_model_knows_what_each_strategy_is_for():
    slow, fast = scale.LINKS[2], scale.LINKS[1]
    n = 2**20 // 64
    assert scale.ring(n, 64, slow).seconds < scale.gather(n, 64, slow).seconds  # transfers behind the matmuls
    assert scale.gather(128, 256, fast).seconds < scale.ring(128, 256, fast).seconds  # latency of 2 W hops
    for world in (8, 64):  # what a GPU holds: growing with all rows, or with its own
        assert scale.gather(n, 2 * world, fast).memory > 1.9 * scale.gather(n, world, fast).memory
        assert scale.ring(n, 2 * world, fast).memory == scale.ring(n, world, fast).memory
    for cost in (scale.gather(n, 64, fast), scale.ring(n, 64, fast)):
        assert 0 <= cost.exposed < 1 and cost.seconds >= cost.compute
