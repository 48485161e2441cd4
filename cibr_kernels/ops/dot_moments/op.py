"""The two moments of a separable critic over all pairs; the (n, m) scores are never stored.

    S_ij = <f_i, g_j>        J = mean_i S_i,offset+i        L = log mean_(i,j) in P exp S_ij

One global log-sum-exp of the rows of `dot_lse`: 1 + 3 matmul passes, O((n + m) k) memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cibr_kernels.ops.dot_lse.op import dot_lse


def dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (m, k)
    *,
    offset: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S = f g^T: 0-d tensors, float32 (float64 for float64), differentiable in f and g.  No checks."""
    n, m = f.shape[0], g.shape[0]
    one = f.new_ones((), dtype=torch.float64 if f.dtype == torch.float64 else torch.float32)
    rows, _, positives = dot_lse(
        f, g, one, offset=offset, mask_positives=not include_diagonal, need_cols=False, backend=backend
    )
    # in float64, O(n): L is often near 0, where log of the sum less log of the count cancels
    el = rows.double().logsumexp(0) - math.log(n * m - (0 if include_diagonal else n))
    return positives.mean(), el.to(rows.dtype)
