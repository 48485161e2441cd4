"""DDP and FSDP2 around critics and objectives; losses with process groups that are copied, saved, reset."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import wrapped_runs
from sharded import F32, check

import cibr_kernels as ck


@pytest.mark.parametrize(("kind", "estimator"), [("concat", "mine"), ("two layers", "dv"), ("separable", "infonce")])
@pytest.mark.parametrize("rows", [(5, 5), (3, 8, 1)], ids=str)
def test_a_critic_in_ddp(ranks, kind, rows, estimator):
    check(ranks.run(wrapped_runs.in_ddp, len(rows), kind, rows, estimator), F32)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("root", "concat"),
        ("root", "two layers"),
        ("critics", "concat"),
        ("critics", "separable"),
        ("linears", "concat"),
        ("linears", "separable"),
        ("both", "concat"),
    ],
)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_fully_sharded_objectives(ranks, how, kind, half):
    """With MixedPrecisionPolicy, gradients of one process are rounded to bfloat16, those of ranks summed in float32."""
    limit = 2 * torch.finfo(torch.bfloat16).eps if half else 1e-5
    for errors in ranks.run(wrapped_runs.in_fsdp, 2, how, kind, half):
        assert max(errors.values()) < limit, errors


@pytest.mark.parametrize(
    ("kind", "strategy", "estimator", "negatives", "dtype"),
    [
        ("separable", "ring", "dv", "all", torch.bfloat16),
        ("separable", "ring", "js", "all", torch.float16),
        ("separable", "gather", "smile", "all", torch.bfloat16),
        ("separable", "ring", "infonce", "all", torch.float16),
        ("concat", "gather", "js", "all", torch.bfloat16),
        ("concat", "gather", "mine", ck.shifts(2), torch.float16),
        ("two layers", "gather", "infonce", "all", torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_critics(ranks, kind, strategy, estimator, negatives, dtype):
    """Each rank rounds its gradients, and some of them cancel."""
    limit = 8 * torch.finfo(dtype).eps
    for errors in ranks.run(wrapped_runs.in_half, 3, kind, strategy, estimator, negatives, dtype):
        assert max(errors) < limit, errors


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("sharded", "shard the module that holds the critic"),
        ("sharded linear", "shard the module that holds the"),
        ("hooked in DDP", "DistributedDataParallel sees one call for each backward"),
    ],
)
def test_what_cannot_be_called_in_panels_is_refused(ranks, how, words):
    assert all(words in text for text in ranks.run(wrapped_runs.refused, 2, how))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_batch_of_one_rank_poisons_no_statistics(ranks, value):
    assert all(ranks.run(wrapped_runs.poisoned, 3, value))


def test_from_the_meta_device(ranks):
    for found in ranks.run(wrapped_runs.from_meta, 2):
        assert found["finite"] and found["step"] == 0 and not found["ema.text_own.started"]
        assert found["standardize_image.var"] == [1.0] * 7 and not any(found["standardize_image.mean"])
        limit = 1 / math.sqrt(7 + 6)
        assert all(0.8 * limit < found[name] <= limit for name in ("x_proj", "z_proj"))


def test_copies_keep_the_process_group(ranks):
    assert all(all(answer) for answer in ranks.run(wrapped_runs.copies, 2))


def test_a_saved_loss_says_which_group_is_missing(ranks):
    loss = pickle.loads(ranks.run(wrapped_runs.pickled, 2)[0])
    x = torch.randn(4, 3)
    again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    for each in (loss, again):
        with pytest.raises(ValueError, match=r"ClipLoss was saved with the process group .* of ranks \[0, 1\]"):
            each(x, x, 5.0)
        each.process_group = None
        assert torch.equal(each(x, x, 5.0), ck.clip_loss(x, x, 5.0))
