"""clip_loss in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

    l_ij = scale_i * <x_i, y_j>    row i's positive is column first_positive + i, candidates all not masked
    loss_i = LSE_j l_ij - sum_j q_ij l_ij        q_i the target distribution over row i's candidates
    loss = mean_i of that (one_way), or the mean of it and of the same over the n columns that have a positive

LSE_j l_ij - l_i,pos is written softplus(LSE_{j != pos} l_ij - l_i,pos): the same number, whose gradient does not cancel
when the loss is tiny (at scale 100 even float64 loses every digit of softmax - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import softplus
from cibr_kernels.primitives.dot.lse.reference import dot_lse, is_positive


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, first_positive: int = 0, one_way: bool = False) -> Tensor:
    """x (n, d), y (m, d), scale () -> loss (), differentiable in all three.  Source: CLIP (2103.00020), Figure 3."""
    rows, cols, positives = dot_lse(x, y, scale, first_positive=first_positive)
    loss = softplus(rows - positives).mean()
    if one_way:
        return loss
    return (loss + softplus(cols[first_positive : first_positive + len(x)] - positives).mean()) / 2


def direction(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    extra: Tensor | None = None,
    ids: Tensor | None = None,
    several_positives: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """One direction with everything that clip_loss knows: anchors x (n, d), candidates y (n, d) and extra (k, d), scale
    () or (n,), ids (n,) -> losses (n,), the largest logit beside the positive (n,)."""
    n, columns = len(x), y if extra is None else torch.cat([y, extra])
    logits = scale.reshape(-1, 1) * (x @ columns.T)
    positive = is_positive(n, len(columns), 0, x.device)
    same = torch.zeros_like(positive)
    if ids is not None:
        same[:, :n] = ids[:, None] == ids
    kept = torch.ones_like(positive) if several_positives else positive | ~same
    target = (positive | (same & several_positives)).to(x.dtype)
    target = (1 - label_smoothing) * target / target.sum(1, keepdim=True)
    target = target + label_smoothing * kept / kept.sum(1, keepdim=True)
    masked = logits.masked_fill(~kept, float("-inf"))
    highest = masked.masked_fill(positive, float("-inf")).amax(1)
    return masked.logsumexp(1) - (target * logits).sum(1), highest
