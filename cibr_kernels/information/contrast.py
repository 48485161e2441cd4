"""Estimates that need more of the scores than J and L.  p_i = T(x_i, z_i), S_ij = T(x_i, z_j), sp(t) = log(1 + e^t).

    JS       -mean_i sp(-p_i) - mean_ij sp(S_ij)          what a discriminator maximises; 2 JSD - log 4 at its best
    SMILE    J - log mean_ij e^clamp(S_ij, -tau, tau)     the value; its gradient is that of JS
    InfoNCE  mean_i [p_i - log sum_j e^S_ij] + log M      the positive is one of the M columns of its row

Each is a mean over rows.  An additive critic takes one sweep of scores and one of gradients (`scores.py`), a
separable one the passes of `dot_lse` or `dot_softplus`, any other critic panels of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.lse import sharded_dot_lse
from cibr_kernels.distributed.softplus import sharded_dot_softplus
from cibr_kernels.information.critics import Additive, Dot
from cibr_kernels.information.pairs import Pairs
from cibr_kernels.information.panels import dot_clamped, general_sums
from cibr_kernels.information.sampled import sampled_scores
from cibr_kernels.information.scores import additive_contrast
from cibr_kernels.numerics import log_count, log_mean_exp_of_rows, promote, softplus
from cibr_kernels.primitives.dot.lse.op import dot_lse
from cibr_kernels.primitives.dot.softplus.op import dot_softplus

CONTRASTS = ("js", "smile", "infonce")
Parts = tuple[Tensor, Tensor, Tensor]  # loss (), positives (n,), log-sum-exps of clamped scores (n,) or (0,)


def contrast(pairs: Pairs, estimator: str, *, tau: float = 5.0) -> Tensor:
    """-> the estimate in nats, (), of all ranks' rows.  tau: SMILE's.  No checks; outside of autocast."""
    kind = "infonce" if estimator == "infonce" else "js"
    clamp = tau if estimator == "smile" else None
    sampled = pairs.negatives != "all"
    loss, positives, clamped = _sampled(pairs, kind, clamp) if sampled else _all(pairs, kind, clamp)
    shards = pairs.shards
    loss = loss * pairs.nan_if_not_finite()
    if shards is not None:
        loss = merge.mean(loss.expand(shards.local), shards)
    if estimator == "infonce":
        columns = 1 + pairs.negatives.k if not isinstance(pairs.negatives, str) else pairs.columns
        return log_count(columns, loss) - loss
    if estimator == "js":
        return -loss
    with torch.no_grad():
        j, el = positives.mean() * pairs.nan_if_not_finite(), _log_mean_exp(clamped, pairs)
        j, el = (j, el) if shards is None else merge.moments(j, el, shards)
    return (j - el).detach() - (loss - loss.detach())


def _log_mean_exp(clamped: Tensor, pairs: Pairs) -> Tensor:
    if isinstance(pairs.negatives, str):
        return log_mean_exp_of_rows(clamped, pairs.per_row)
    clamped64 = clamped.double()
    return (clamped64.logsumexp(0) - log_count(clamped.shape[0] * pairs.negatives.k, clamped64)).to(clamped.dtype)


def _all(pairs: Pairs, kind: str, clamp: float | None) -> Parts:
    """Over every pair of this rank's rows."""
    if pairs.strategy == "ring" and pairs.shards is not None:
        return _ring(pairs, kind)
    scored = pairs.scored()
    right = pairs.all_columns(scored.right)
    if isinstance(scored, Additive):
        return additive_contrast(
            scored.left,
            right,
            scored.w,
            scored.bias,
            kind,
            clamp=clamp,
            activation=scored.activation,
            slope=scored.slope,
            first_positive=pairs.first_positive,
            include_diagonal=pairs.include,
            backend=pairs.backend,
        )
    if isinstance(scored, Dot):
        return _dot(scored.left, right, pairs, kind, clamp)
    if kind == "infonce":
        positives, rows, clamped = general_sums(
            scored, right, "lse", first_positive=pairs.first_positive, include=False
        )
        return softplus(rows - positives).mean(), positives, clamped
    positives, sums, clamped = general_sums(
        scored, right, "softplus", first_positive=pairs.first_positive, include=pairs.include, tau=clamp
    )
    return _js(positives, sums, pairs.per_row), positives, clamped


def _dot(f: Tensor, g: Tensor, pairs: Pairs, kind: str, clamp: float | None) -> Parts:
    """f (n, k), g (m, k)."""
    n, none, one = f.shape[0], f.new_empty(0), promote(f.new_ones(()))
    if kind == "infonce":
        rows, _, positives = dot_lse(
            f, g, one, first_positive=pairs.first_positive, need_cols=False, backend=pairs.backend
        )
        return softplus(rows - positives).mean(), positives, none
    weights = one.new_full((n,), 1 / (n * pairs.per_row))
    first = pairs.first_positive
    negatives = dot_softplus(f, g, one, one.new_zeros(()), weights, first_positive=first, backend=pairs.backend)
    positives = (promote(f) * promote(g[first : first + n])).sum(1)
    loss = _dot_js(positives, negatives, pairs)
    if clamp is None:
        return loss, positives, none
    return loss, positives, dot_clamped(f, g, first_positive=pairs.first_positive, include=pairs.include, tau=clamp)


def _dot_js(positives: Tensor, negatives: Tensor, pairs: Pairs) -> Tensor:
    """positives (n,); negatives (), softplus over the other scores summed, over n and a row's count -> the loss ()."""
    loss = softplus(-positives).mean() + negatives
    return loss + softplus(positives).mean() / pairs.per_row if pairs.include else loss


def _ring(pairs: Pairs, kind: str) -> Parts:
    """Of a separable critic, whose columns go round."""
    assert pairs.shards is not None
    f, g = pairs.embedded()
    one, none = promote(f.new_ones(())), f.new_empty(0)
    if kind == "infonce":
        rows, _, positives = sharded_dot_lse(
            f, g, one, pairs.shards, strategy="ring", need_cols=False, backend=pairs.backend
        )
        return softplus(rows - positives).mean(), positives, none
    # a shard's gradient is made by every rank and scaled by its owner: weights that are those of the whole batch
    weights = one.new_full((f.shape[0],), 1 / (pairs.shards.total * pairs.per_row))
    negatives = sharded_dot_softplus(
        f, g, one, one.new_zeros(()), weights, None, pairs.shards, strategy="ring", backend=pairs.backend
    )
    positives = (promote(f) * promote(g)).sum(1)
    return _dot_js(positives, negatives * (pairs.shards.total / f.shape[0]), pairs), positives, none


def _sampled(pairs: Pairs, kind: str, clamp: float | None) -> Parts:
    """Over the k partners of this rank's rows."""
    scores = sampled_scores(pairs)
    positives, others = scores[0], scores[1:]
    clamped = others.new_empty(0) if clamp is None else others.detach().clamp(-clamp, clamp).logsumexp(0)
    if kind == "infonce":
        return softplus(others.logsumexp(0) - positives).mean(), positives, clamped
    return _js(positives, softplus(others).sum(0), others.shape[0]), positives, clamped


def _js(positives: Tensor, sums: Tensor, per_row: int) -> Tensor:
    """positives (n,), each row's sum of softplus over per_row scores (n,) -> ()."""
    return softplus(-positives).mean() + sums.mean() / per_row
