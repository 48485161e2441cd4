"""siglip_loss in plain PyTorch: the specification.  It promotes instead of casting, so float64 in is the oracle.

l_ij = scale <x_i, y_j> + bias        z_ij = 1 at positives, -1 at negatives, 0 at masked pairs
loss_i = 1/2 sum_j [softplus(-z_ij l_ij) + softplus(-z_ji l_ji)],  masked pairs left out
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import promote, softplus


def siglip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids: Tensor | None = None,
    several_positives: bool = False,
    x_negatives: Tensor | None = None,
    y_negatives: Tensor | None = None,
) -> Tensor:
    """x, y (n, d), scale (), bias (), ids (n,), negatives (k, d) -> losses (n,), differentiable.

    Their mean is SigLIP's loss (2303.15343, equation 1).
    """
    x, y = promote(x), promote(y)
    positive = torch.eye(len(x), dtype=torch.bool, device=x.device)
    same = positive if ids is None else ids[:, None] == ids
    sign = torch.where(same if several_positives else positive, 1.0, -1.0)
    e = softplus(-sign * (scale * (x @ y.T) + bias)) * (several_positives | positive | ~same)
    losses = (e.sum(0) + e.sum(1)) / 2
    for anchors, negatives in ((x, y_negatives), (y, x_negatives)):
        if negatives is not None:
            losses = losses + softplus(scale * (anchors @ promote(negatives).T) + bias).sum(1)
    return losses
