"""All pairs of a critic that only has scores, a panel of rows at a time: O(panel) memory in forward and backward.

Every estimate is made of three numbers per row: its positive, the log-sum-exp of its other scores, the sum of their
softplus.  A panel is computed again in the backward (`torch.utils.checkpoint`), so two sweeps of scores and one of
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cibr_kernels.information.critics import General
from cibr_kernels.numerics import panel_rows, promote, softplus
from cibr_kernels.primitives.dot.lse.op import stash_budget


def in_panels(t: Tensor, rows: int) -> Sequence[Tensor]:
    """t (n, .) in panels.  One that holds all is t itself: a compiled graph of it serves any n that fits."""
    return (t,) if rows >= t.shape[0] else t.split(rows)


def recomputed(f: Callable[..., Tensor], *tensors: Tensor, random: bool) -> Tensor:
    """f(*tensors), whose intermediate results are made again in the backward.  random: f may draw random numbers."""
    if not torch.is_grad_enabled():
        return f(*tensors)
    return checkpoint(f, *tensors, use_reentrant=False, preserve_rng_state=random)


def row_sums(kind: str, scores: Tensor, column: int, include: bool) -> tuple[Tensor, Tensor]:
    """scores (p, m), row i's positive in column `column` + i -> positives (p,), sums over the others (p,).

    kind: "lse", log-sum-exp, or "softplus".  The positives take part with `include`.
    """
    positives = scores.diagonal(column)[: scores.shape[0]]
    negatives = scores if include else scores.masked_fill(_diagonal(scores, column), -math.inf)
    return positives, negatives.logsumexp(1) if kind == "lse" else softplus(negatives).sum(1)


@torch.no_grad()
def log_sum_clamped(scores: Tensor, column: int, include: bool, tau: float) -> Tensor:
    """(p, m) -> (p,): log-sum-exp of each row's scores clamped to [-tau, tau], the positives among them or not."""
    clamped = scores.clamp(-tau, tau)
    if not include:
        clamped.diagonal(column)[: scores.shape[0]].fill_(-math.inf)
    return clamped.logsumexp(1)


def general_sums(
    scored: General, right: Tensor, kind: str, *, first_positive: int, include: bool, tau: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> positives (n,), sums (n,) as of `row_sums`, clamped (n,) ((0,) without tau) without gradient."""
    left = scored.left
    rows = panel_rows(stash_budget(), right.shape[0] * scored.width * left.itemsize, left.shape[0])
    parts = []
    column = first_positive
    for here in in_panels(left, rows):

        def panel(here: Tensor, right: Tensor, column: int = column) -> Tensor:
            scores = scored.grid(here, right)
            found = row_sums(kind, scores, column, include)
            return torch.stack(found if tau is None else (*found, log_sum_clamped(scores, column, include, tau)))

        parts.append(recomputed(panel, here, right, random=scored.random))
        column += here.shape[0]
    sums = torch.cat(parts, 1)
    return sums[0], sums[1], sums[0].new_empty(0) if tau is None else sums[2].detach()


@torch.no_grad()
def dot_clamped(f: Tensor, g: Tensor, *, first_positive: int, include: bool, tau: float) -> Tensor:
    """f (n, k), g (m, k) -> (n,): log-sum-exp of each row of f g^T, clamped."""
    f, g = promote(f), promote(g)
    rows = panel_rows(stash_budget(), g.shape[0] * 2 * f.itemsize, f.shape[0], 16)
    parts, column = [], first_positive
    for here in in_panels(f, rows):
        parts.append(log_sum_clamped(here @ g.T, column, include, tau))
        column += here.shape[0]
    return torch.cat(parts)


def _diagonal(scores: Tensor, column: int) -> Tensor:
    """(p, m) bool: True at (i, column + i)."""
    p, m = scores.shape
    return torch.arange(m, device=scores.device) == torch.arange(p, device=scores.device)[:, None] + column
