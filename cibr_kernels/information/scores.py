"""Losses of an additive critic over all pairs that are more than a log-mean-exp; no n x m scores, no (n, m, h).

    S_ij = w . phi(a_i + b_j) + c      p_i = S_i,first_positive+i      M = m - 1 columns per row, or m with the diagonal

    "js"        loss = mean_i [softplus(-p_i) + mean_j softplus(S_ij)]
    "infonce"   loss = mean_i softplus(R_i - p_i) = -mean_i [p_i - log sum_j exp S_ij],  R_i without the positive

    G = dloss/dS:    js  sigmoid(S_ij) / nM,  -sigmoid(-p_i) / n       infonce  exp(S_ij - LSE_i) / n,  less 1/n at p_i

Both are means of rows, so a panel of rows has all it needs, and G is known in the forward: one sweep of scores and,
where a gradient is needed, one of gradients.  The panel's size follows from `stash_budget()`; sums of panels are
float64, in their order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cibr_kernels.dispatch.library import operator, or_zeros
from cibr_kernels.information.panels import log_sum_clamped, row_sums
from cibr_kernels.numerics import early_dtype, panel_rows, softplus, sum_dtype
from cibr_kernels.primitives.additive.scores.op import (
    additive_scores,
    additive_scores_backward,
    additive_scores_forward,
)
from cibr_kernels.primitives.dot.lse.op import stash_budget

SERVES = "a js, smile or infonce estimate with a concat critic"

KINDS = ("js", "infonce")
LEAST_ROWS = 16  # of a panel, whatever the budget
TEMPORARIES = 4  # of a panel's size: scores, their exponentials, G and one in the making


def additive_contrast(
    a: Tensor,  # (n, h)
    b: Tensor,  # (m, h)
    w: Tensor,  # (h,)
    bias: Tensor,  # ()
    kind: str,
    *,
    clamp: float | None = None,
    activation: str = "relu",
    slope: float = 0.01,
    first_positive: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss (), positives (n,), clamped (n,) ((0,) without `clamp`): log sum_j exp(min(max(S_ij, -clamp), clamp)).

    Only the loss has a gradient, in a, b, w and bias.  float32, float64 for float64.  No checks.
    """
    if backend == "reference":
        scores = additive_scores(a, b, w, activation=activation, slope=slope, backend=backend) + bias
        return _reference(scores, kind, first_positive, include_diagonal, clamp)
    grad = torch.is_grad_enabled()
    needs = [grad and t.requires_grad for t in (a, b, w, bias)]
    if any(needs):
        a, b, w = (t.to(early_dtype(t.dtype)) for t in (a, b, w))
    a, b, w = a.contiguous(), b.contiguous(), w.contiguous()
    rows = panel_rows(stash_budget(), b.shape[0] * TEMPORARIES * max(a.itemsize, 4), a.shape[0], LEAST_ROWS)
    loss, positives, clamped, *_ = additive_contrast_forward(
        a, b, w, bias, kind, clamp, activation, slope, first_positive, include_diagonal, rows, *needs, backend
    )
    return loss, positives, clamped


def _reference(
    scores: Tensor, kind: str, first_positive: int, include: bool, clamp: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`additive_contrast` by its definition on all scores (n, m), with derivatives of every order."""
    clamped = scores.new_empty(0) if clamp is None else log_sum_clamped(scores.detach(), first_positive, include, clamp)
    if kind == "infonce":
        positives, rows = row_sums("lse", scores, first_positive, include=False)
        return softplus(rows - positives).mean(), positives.detach(), clamped
    positives, sums = row_sums("softplus", scores, first_positive, include)
    per_row = scores.shape[1] if include else scores.shape[1] - 1
    return softplus(-positives).mean() + sums.mean() / per_row, positives.detach(), clamped


@operator(SERVES)
def additive_contrast_forward(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    bias: Tensor,
    kind: str,
    clamp: float | None,
    activation: str,
    slope: float,
    first_positive: int,
    include_diagonal: bool,
    rows: int,
    need_a: bool,
    need_b: bool,
    need_w: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), positives (n,), clamped (n,) or (0,), its gradients: (n, h), (m, h), (h,), or (0,) each, and ()."""
    (n, m), sums = (a.shape[0], b.shape[0]), sum_dtype(a)
    per_row = m if include_diagonal else m - 1
    loss, dbias = (torch.zeros((), dtype=torch.float64, device=a.device) for _ in range(2))
    positives, clamped = a.new_empty(n, dtype=sums), a.new_empty(0 if clamp is None else n, dtype=sums)
    da = a.new_empty(a.shape if need_a else 0)
    db, dw = (t.new_zeros(t.shape if need else 0, dtype=sums) for t, need in ((b, need_b), (w, need_w)))
    for first in range(0, n, rows):
        here = a[first : first + rows]
        span, column = slice(first, first + len(here)), first_positive + first
        scores = additive_scores_forward(here, b, w, activation, slope, backend).add_(bias)
        positives[span] = scores.diagonal(column)[: len(here)]
        if clamp is not None:
            clamped[span] = log_sum_clamped(scores, column, include_diagonal, clamp)
        needs = need_a, need_b, need_w
        if kind == "js":
            losses, g = _js(scores, positives[span], column, include_diagonal, per_row, any((*needs, need_bias)))
        else:
            losses, g = _infonce(scores, positives[span], column, any((*needs, need_bias)))
        loss += losses.sum(dtype=torch.float64)
        if any(needs):
            more = additive_scores_backward(g / n, here, b, w, activation, slope, *needs, backend)
            if need_a:
                da[span] = more[0]
            for total, part, need in ((db, more[1], need_b), (dw, more[2], need_w)):
                if need:
                    total += part
        if need_bias:
            dbias += g.sum(dtype=torch.float64)
    db, dw = db.to(b.dtype), dw.to(w.dtype)
    return (loss / n).to(sums), positives, clamped, da, db, dw, (dbias / n).to(bias.dtype)


def _js(
    scores: Tensor, positives: Tensor, column: int, include: bool, per_row: int, need: bool
) -> tuple[Tensor, Tensor]:
    """scores (p, m) -> the rows' losses (p,) in float64, and their gradient (p, m), made in place of the scores."""
    negatives = softplus(scores)
    if not include:
        negatives.diagonal(column)[: len(positives)].zero_()
    losses = softplus(-positives).double() + negatives.sum(1, dtype=torch.float64) / per_row
    if not need:
        return losses, scores
    del negatives
    g = scores.sigmoid_().div_(per_row)
    diagonal = g.diagonal(column)[: len(positives)]
    diagonal.copy_((diagonal if include else 0) - (-positives).sigmoid())
    return losses, g


def _infonce(scores: Tensor, positives: Tensor, column: int, need: bool) -> tuple[Tensor, Tensor]:
    """As `_js`."""
    diagonal = scores.diagonal(column)[: len(positives)]
    diagonal.fill_(-math.inf)
    rows = scores.logsumexp(1)
    losses = softplus(rows - positives).double()
    if need:
        share = (rows - positives).sigmoid()  # of the negatives in the row's sum
        scores.sub_(rows[:, None]).exp_().mul_(share[:, None])
        diagonal.copy_(-share)
    return losses, scores


@additive_contrast_forward.register_fake
def _(a, b, w, bias, kind, clamp, *more):
    *_, need_a, need_b, need_w, _, _ = more
    n, sums = a.shape[0], sum_dtype(a)
    grads = [t.new_empty(t.shape if need else 0) for t, need in ((a, need_a), (b, need_b), (w, need_w))]
    positives, clamped = a.new_empty(n, dtype=sums), a.new_empty(0 if clamp is None else n, dtype=sums)
    return a.new_empty((), dtype=sums), positives, clamped, *grads, torch.empty_like(bias)


@operator(SERVES)
def additive_contrast_backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor, da: Tensor, db: Tensor, dw: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The saved gradients times the loss's.  They depend on a, b, w and bias, or a second backward would not refuse."""
    return da * grad, db * grad, dw * grad, dbias * grad


@additive_contrast_backward.register_fake
def _(grad, a, b, w, bias, da, db, dw, dbias):
    return tuple(torch.empty_like(t) for t in (da, db, dw, dbias))


def _setup(ctx, inputs, output) -> None:
    _, positives, clamped, *grads = output
    a, b, w, bias, *_, ctx.need_a, ctx.need_b, ctx.need_w, ctx.need_bias, _ = inputs
    ctx.mark_non_differentiable(positives, clamped, *grads)
    ctx.set_materialize_grads(False)  # zeros for each of those
    ctx.save_for_backward(a, b, w, bias, *grads)


def _backward(ctx, grad, *_):
    had = ctx.need_a, ctx.need_b, ctx.need_w, ctx.need_bias
    saved = ctx.saved_tensors
    (grad,) = or_zeros((grad,), saved[3:4])
    grads = additive_contrast_backward(grad, *saved)
    needs = [wanted and made for wanted, made in zip(ctx.needs_input_grad[:4], had, strict=True)]
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 12


additive_contrast_forward.register_autograd(_backward, setup_context=_setup)
