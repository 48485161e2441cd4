"""clip_loss in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

    l_ij = scale * <x_i, y_j>        row i's positive is column offset + i
    loss = 1/n sum_i [LSE_j l_ij - l_i,pos]                                  one_way
    loss = half of that plus half of the same over the n columns that have a positive

LSE_j l_ij - l_i,pos is written softplus(LSE_{j != pos} l_ij - l_i,pos): the same number, whose gradient does not cancel
when the loss is tiny (at scale 100 even float64 loses every digit of softmax - 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.ops.dot_lse.reference import dot_lse


def clip_loss(x: Tensor, y: Tensor, scale: Tensor, offset: int = 0, one_way: bool = False) -> Tensor:
    """x (n, d), y (m, d), scale () -> loss (), differentiable in all three.  Source: CLIP (2103.00020), Figure 3."""
    rows, cols, positives = dot_lse(x, y, scale, offset)
    loss = _softplus(rows - positives).mean()
    if one_way:
        return loss
    return (loss + _softplus(cols[offset : offset + len(x)] - positives).mean()) / 2


def _softplus(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))
