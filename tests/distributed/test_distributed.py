"""Losses over several ranks, on gloo: against one process with all rows, in float64.

Four processes serve the whole file (tests/support/ranks.py); what they do is in sharded.py and sharded_runs.py there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import sharded
import sharded_runs
import torch
from covering import pairs
from forks import CONTEXT, process
from sharded import F32, F64, check

import cibr_kernels as ck
from cibr_kernels.losses.clip.options import DIRECTIONS

# rows of each rank
EVEN = [(6,), (5, 5), (4, 4, 4), (6, 6, 6, 6)]
UNEVEN = [(7, 1), (3, 8, 1), (9, 2, 5, 40), (1, 1, 1, 1), (1, 33, 2, 3)]


# ------------------------------------------------------------------------------------- equal to one process
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("rows", EVEN + UNEVEN, ids=str)
def test_clip_loss(ranks, rows, strategy, dtype):
    check(ranks.run(sharded.clip, len(rows), rows, dtype, strategy=strategy), dtype)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(5, 5), (3, 8, 1)], ids=str)
def test_clip_loss_one_way(ranks, rows, strategy):
    check(ranks.run(sharded.clip, len(rows), rows, F32, strategy=strategy, one_way=True), F32)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("frozen", [("zv",), ("zt",), ("zv", "zt")], ids="+".join)
def test_clip_loss_of_frozen_towers(ranks, frozen, strategy):
    check(ranks.run(sharded.clip, 3, (3, 8, 1), F32, frozen=frozen, strategy=strategy), F32)


ALL_SIDES = ck.Negatives(directions=DIRECTIONS)
CONTRASTIVE: list[tuple[str, dict]] = [
    ("clip_loss", {"groups": 5}),
    ("clip_loss", {"groups": 5, "one_way": True}),
    ("clip_loss", {"groups": 5, "group_mode": "positives", "label_smoothing": 0.1}),
    ("clip_loss", {"groups": 5, "label_smoothing": 0.1, "queues": ["text_negatives"]}),
    ("clip_loss", {"label_smoothing": 0.1, "weighted": True}),
    ("clip_loss", {"temperatures": True, "queues": ["text_negatives", "image_negatives"], "reduction": "sum"}),
    ("clip_loss", {"temperatures": True, "groups": 3}),
    ("clip_loss", {"reduction": "none", "weighted": True, "groups": 4}),
    ("siglip_loss", {}),
    ("siglip_loss", {"groups": 5}),
    ("siglip_loss", {"groups": 5, "group_mode": "positives", "weighted": True}),
    ("siglip_loss", {"reduction": "sum", "weighted": True, "queues": ["text_negatives", "image_negatives"]}),
    ("siglip_loss", {"reduction": "none", "groups": 4}),
    ("siglip_loss", {"negatives": ALL_SIDES, "groups": 4, "weighted": True}),
    ("siglip_loss", {"negatives": ALL_SIDES, "reduction": "none"}),
]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"directions": DIRECTIONS, "joint": True, "own": True, "groups": 5},
        {"directions": DIRECTIONS, "hardness": 3.0, "strategy": "ring"},
        {"directions": DIRECTIONS, "margin": 0.1},
        {"guided": True},
    ],
)
def test_clip_loss_with_a_choice_of_negatives(ranks, options, dtype):
    check(ranks.run(sharded.negatives, 3, (3, 8, 1), dtype, **options), dtype)


def on_a_ring(name: str, options: dict) -> bool:
    """Not refused there: test_clip_options.py, test_siglip_loss.py."""
    if options.get("queues") or (name, options.get("group_mode")) == ("clip_loss", "positives"):
        return False
    return (name, options.get("reduction")) != ("siglip_loss", "none")


@pytest.mark.parametrize(
    ("strategy", "case", "rows", "dtype"),
    [
        (strategy, *row)
        for strategy, cases in (("gather", CONTRASTIVE), ("ring", [c for c in CONTRASTIVE if on_a_ring(*c)]))
        for row in pairs(cases, [(5, 5), (3, 8, 2), (4, 4, 4, 4)], [F32, F64])
    ],
    ids=str,
)
def test_contrastive_options(ranks, strategy, case, rows, dtype):
    name, options = case
    check(ranks.run(sharded.contrastive, len(rows), rows, dtype, name, strategy=strategy, **options), dtype)


@pytest.mark.parametrize(
    ("rows", "strategy", "dtype"),
    [((5, 5), "gather", F32), ((3, 8, 1), "ring", F32), ((3, 8, 1), "gather", F64), ((4, 4, 4, 4), "ring", F64)],
    ids=str,
)
def test_nt_xent_knows_its_samples_on_every_rank(ranks, rows, strategy, dtype):
    check(ranks.run(sharded.ntxent, len(rows), rows, dtype, strategy=strategy), dtype)


def test_nt_xent_module_takes_the_default_group(ranks):
    for gathered, alone, text in ranks.run(sharded_runs.ntxent_module, 4):
        assert gathered == pytest.approx(alone, rel=1e-6)
        assert text == "ValueError: NTXentLoss: rank 3 has another temperature than rank 0"


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("rows", [(5, 5), (3, 8, 1)], ids=str)
def test_metrics_are_those_of_all_rows(ranks, rows, name, groups, strategy):
    answers = ranks.run(sharded.metrics, len(rows), rows, name, groups, strategy)
    for ours, one in answers:
        assert ours == pytest.approx(one, rel=1e-5) and ours == answers[0][0]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_a_group_of_some_ranks(ranks, strategy):
    """Whose ranks are not numbered as the processes are."""
    answers = ranks.run(sharded.some, 4, strategy)
    check([answers[1], answers[3]], F32)
    assert answers[0] == answers[2] == "ValueError: clip_loss: this process is not in the process_group it was given"


@pytest.mark.parametrize("diagonal", ["exclude", "include"])
@pytest.mark.parametrize(
    ("kind", "strategy"), [("relu", "gather"), ("gelu", "gather"), ("separable", "gather"), ("separable", "ring")]
)
@pytest.mark.parametrize("rows", [(6,), (5, 5), (3, 8, 1), (9, 2, 5, 40)], ids=str)
def test_critic_moments(ranks, rows, kind, strategy, diagonal):
    for dtype in (F32, F64):
        answers = ranks.run(sharded.moments, len(rows), rows, dtype, kind, strategy=strategy, diagonal=diagonal)
        check(answers, dtype)


@pytest.mark.parametrize("rows", [(6,), (5, 5), (3, 8, 1), (1, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_shifts_go_on_across_ranks(ranks, rows, k):
    check(ranks.run(sharded.moments, len(rows), rows, F64, "relu", negatives=ck.shifts(k)), F64)


@pytest.mark.parametrize(
    "options",
    [{"estimator": "nwj"}, {"estimator": "tuba", "a": 2.0}, {"estimator": "remine", "c": 0.3}, {"ema": True}],
    ids=str,
)
def test_mutual_information(ranks, options):
    for dtype in (F32, F64):
        check(ranks.run(sharded.information, 3, (3, 8, 1), dtype, **options), dtype)


# every family of critic by every estimator; DV and the bounds of critic_moments are above
ESTIMATES: list[tuple[str, dict]] = [
    (kind, {"estimator": estimator} | more)
    for kind in ("relu", "separable", "two layers", "callable")
    for estimator in ("dv", "js", "smile", "infonce")
    for more in ({}, {"queue": True}, {"negatives": ck.shifts(3)})
]
ESTIMATES += [
    ("separable", {"estimator": estimator, "strategy": "ring", "diagonal": diagonal})
    for estimator in ("dv", "js", "infonce")
    for diagonal in ("exclude", "include")
]
ESTIMATES += [
    ("gaussian", {"estimator": "club", "queue": queue, "diagonal": diagonal})
    for queue in (False, True)
    for diagonal in ("exclude", "include")
]


@pytest.mark.parametrize("rows", [(5, 5), (3, 8, 1), (9, 2, 5, 4)], ids=str)
@pytest.mark.parametrize(("kind", "options"), ESTIMATES, ids=lambda v: str(v))
def test_estimates(ranks, kind, options, rows):
    unit = {"separable": (".2.bias",), "gaussian": ("bias",)}.get(kind, ())  # added to every row or column: they cancel
    check(ranks.run(sharded.information, len(rows), rows, F32, kind, unit=unit, **options), F32)


@pytest.mark.parametrize("rows", [(5, 3), (3, 8, 1), (6, 6, 6, 6)], ids=str)
def test_estimates_have_the_same_bits_on_every_rank(ranks, rows):
    kinds, estimators = ("relu", "separable", "callable"), ("dv", "js", "smile", "infonce")
    answers = ranks.run(sharded.estimates, len(rows), rows, kinds, estimators)
    assert len(answers[0]) == 12 and all(answer == answers[0] for answer in answers)


def test_random_partners_are_of_one_process(ranks):
    for answer in ranks.run(sharded.random_partners, 2):
        for text, name in zip(answer, ["derangement"] * 2 + ["permutation"] * 2, strict=True):
            assert text.startswith("ValueError: ") and f"{name} would need rows of every rank on every rank" in text


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "dv", "decomposition": "markov"},
        {"estimator": "dv", "decomposition": "joint"},
        {"estimator": "ceb"},
        {"estimator": "align"},
    ],
    ids=str,
)
def test_conditional_mutual_information(ranks, options):
    check(ranks.run(sharded.conditional, 3, (3, 8, 1), F32, **options), F32)


@pytest.mark.parametrize("rows", [(6,), (5, 5), (3, 8, 1), (9, 2, 5, 40)], ids=str)
def test_cibr_loss(ranks, rows):
    for dtype in (F32, F64):
        check(ranks.run(sharded.cibr, len(rows), rows, dtype), dtype)
    check(ranks.run(sharded.cibr, len(rows), rows, F32, strategy="ring", negatives=ck.shifts(2)), F32)


@pytest.mark.parametrize(("estimator", "grouped"), [("variance", False), ("variance", True), ("ceb", False)])
def test_cibr_loss_without_an_adversary(ranks, estimator, grouped):
    for rows in ((5, 5), (3, 8, 1)):
        check(ranks.run(sharded.upper_bound, len(rows), rows, F32, estimator, grouped), F32)


def test_diagnostics_and_warnings_are_of_all_ranks(ranks):
    (one,) = ranks.run(sharded.looked_at, 1, (12,))
    for answer in ranks.run(sharded.looked_at, 3, (3, 8, 1)):
        assert answer == pytest.approx(one, rel=1e-4)
    assert one["warnings"] == 1 and one["step"] == 3


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "loop"])
@pytest.mark.parametrize(
    "steps",
    [[(6, 6)], [(4, 4, 4)], [(6, 6, 6, 6)], [(9, 2, 5, 40)], [(8, 8), (8, 8)], [(3, 8, 4), (5, 5, 5), (1, 9, 4)]],
    ids=str,
)
def test_training_under_averaged_gradients(ranks, steps, wrapper):
    """Linear towers, a temperature, four critics; statistics, moving averages and the step, over micro-batches."""
    check(ranks.run(sharded_runs.training, len(steps[0]), steps, wrapper), F32)


@pytest.mark.parametrize(
    ("steps", "strategy"),
    [
        ([(6, 6)], "gather"),
        ([(6, 6)], "ring"),
        ([(9, 2, 5, 40)], "gather"),
        ([(8, 8), (8, 8)], "gather"),
        ([(3, 8, 4), (5, 5, 5), (2, 9, 4)], "ring"),
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapper", ["ddp", "loop"])
def test_sigmoid_training_under_averaged_gradients(ranks, steps, strategy, wrapper):
    """Linear towers, a temperature and a bias, over micro-batches."""
    check(ranks.run(sharded_runs.training, len(steps[0]), steps, wrapper, sharded_runs.Sigmoid, strategy), F32)


# ------------------------------------------------------------------------------------- properties
def test_every_rank_has_the_same_bits_in_every_run(ranks):
    assert len({bits for answer in ranks.run(sharded_runs.bits, 2) for bits in answer}) == 1


@pytest.mark.parametrize("rows", [(5, 5), (3, 8, 1)], ids=str)
def test_noise_is_that_of_one_process(ranks, rows):
    assert all(ranks.run(sharded_runs.noise, len(rows), rows))


def test_sums_of_uneven_shards_merge_exactly(ranks):
    for errors in ranks.run(sharded_runs.merged, 3):
        assert max(errors) < 1e-10


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_half_precision_stays_within_its_rounding(ranks, strategy, autocast):
    for errors in ranks.run(sharded_runs.half, 3, strategy, autocast):
        assert all(0 < e < torch.finfo(torch.bfloat16).eps for e in errors.values()), errors


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_nan_on_one_rank_is_nan_on_all(ranks, strategy):
    assert ranks.run(sharded_runs.nan, 2, strategy) == [[False, True], [False, True]]


def test_clip_loss_module_gives_the_whole_loss_or_this_ranks_part(ranks):
    answers = ranks.run(sharded_runs.module_losses, 2)
    values = [{name: value for name, (value, _) in answer.items()} for answer in answers]
    for answer, value in zip(answers, values, strict=True):
        assert value["local_loss=False"] == pytest.approx(value["one process"], rel=1e-6)
        gradients = [gradient for _, gradient in answer.values()]
        assert gradients[0] == gradients[1] == pytest.approx(gradients[2], rel=1e-4, abs=1e-7)
    parts = [value["local_loss=True"] for value in values]
    assert sum(parts) / 2 == pytest.approx(values[0]["one process"], rel=1e-6) and parts[0] != parts[1]


def test_clip_loss_module_takes_open_clips_arguments(ranks):
    for rank, text in enumerate(ranks.run(sharded_runs.as_open_clip, 4)):
        assert text == f"ValueError: ClipLoss has rank=1, world_size=7, but this process is rank {rank} of 4"
    with pytest.raises(ValueError, match=r"world_size=2, but torch\.distributed is not initialised"):
        ck.nn.ClipLoss(rank=0, world_size=2)(torch.ones(2, 3), torch.ones(2, 3), 5.0)


def test_torch_compile_breaks_the_graph_or_refuses(ranks):
    for (text,) in ranks.run(sharded_runs.compiled, 2):
        assert "with a process_group cannot be traced" in text


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("fault", "of_others", "of_the_last"),
    [
        ("width", "clip_loss: ranks disagree on the width of image_features: 6 on rank 0, 7 on rank 2", None),
        ("dtype", "disagree on the dtype of image_features: torch.float32 on rank 0, torch.float64 on rank 2", None),
        ("gradient", "disagree on the gradient of text_features: not needed on rank 0, needed on rank 2", None),
        ("option", "clip_loss: rank 2 has another one_way than rank 0", None),
        ("strategy", "clip_loss: rank 2 has another strategy than rank 0", None),
        ("loss", "rank 2 calls another loss than rank 0, or with other inputs", None),
        ("critic", "critic_moments: rank 2 has another negatives than rank 0", None),
        (
            "cibr width",
            "CIBRLoss: rank 2 refused its arguments",
            "image_inputs has width 8 but the critic image_own was",
        ),
        ("3-d", "clip_loss: rank 2 refused its arguments", "image_features must be 2-d (rows, features), got shape"),
        ("scale", "clip_loss: rank 2 refused its arguments", "logit_scale must be positive"),
        ("scales", "clip_loss: rank 2 has another number of logit_scales than rank 0", None),
        ("rows", "clip_loss: rank 2 refused its arguments", "image_features has 3 rows but text_features has 2"),
    ],
)
def test_one_wrong_rank_is_named_on_all(ranks, fault, of_others, of_the_last):
    """And the group still works afterwards."""
    answers = ranks.run(sharded_runs.refusal, 3, fault)
    for rank, text in enumerate(answers):
        assert text.startswith("ValueError: "), answers
        assert (of_the_last if of_the_last and rank == 2 else of_others) in text, answers


def test_a_silent_rank_is_an_error_within_the_timeout(ranks):
    # all four, because a group that only some processes make numbers their later groups apart
    (text, seconds), *_ = ranks.run(sharded_runs.silence, 4, 2.0)
    assert text.startswith("RuntimeError: clip_loss: rank 0 of 4 waited in vain for the others") and seconds < 4


def test_a_dead_rank_is_an_error(tmp_path: Path):
    results: Any = CONTEXT.SimpleQueue()
    processes = [process(sharded_runs.death, rank, str(tmp_path / "store"), results) for rank in (0, 1)]
    for started in processes:
        started.start()
    deadline = time.monotonic() + 90
    while results.empty() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not results.empty()
    text, seconds = results.get()
    assert text.startswith("RuntimeError: clip_loss: rank 0 of 2 waited in vain for the others") and seconds < 20
    for started in processes:
        started.join()
    assert processes[1].exitcode == 1
