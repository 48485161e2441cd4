"""The CLIP loss of a rectangle of logits, a part of a batch: dot_lse with a first positive, and O(n) PyTorch."""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.numerics import softplus
from cibr_kernels.primitives.dot.lse.op import dot_lse


def rectangular_clip_loss(
    x: Tensor, y: Tensor, scale: Tensor, *, first_positive: int = 0, one_way: bool = False, backend: str = "auto"
) -> Tensor:
    """The loss of n rows against m columns; row i's positive is column first_positive + i < m.  No checks."""
    rows, cols, positives = dot_lse(x, y, scale, first_positive=first_positive, need_cols=not one_way, backend=backend)
    loss = softplus(rows - positives).mean()
    if one_way:
        return loss
    return (loss + softplus(cols[first_positive : first_positive + x.shape[0]] - positives).mean()) / 2
