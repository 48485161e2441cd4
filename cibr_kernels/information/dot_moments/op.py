"""The two moments of a separable critic over all pairs; the (n, m) scores are never stored.

    S_ij = <f_i, g_j>        J = mean_i S_i,first_positive+i        L = log mean_(i,j) in P exp S_ij

One global log-sum-exp of the rows of `dot_lse`: 1 + 3 matmul passes, O((n + m) k) memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.lse import sharded_dot_lse
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.numerics import log_count
from cibr_kernels.primitives.dot.lse.op import dot_lse


def dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (m, k)
    *,
    first_positive: int = 0,
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of S = f g^T: 0-d tensors, float32 (float64 for float64), differentiable in f and g.  No checks."""
    n, m = f.shape[0], g.shape[0]
    rows, _, positives = dot_lse(
        f,
        g,
        _one(f),
        first_positive=first_positive,
        mask_positives=not include_diagonal,
        need_cols=False,
        backend=backend,
    )
    return positives.mean(), _log_mean_exp(rows, n * m - (0 if include_diagonal else n))


def sharded_dot_moments(
    f: Tensor,  # (n, k)
    g: Tensor,  # (n, k)
    shards: Shards,
    *,
    strategy: str = "gather",
    include_diagonal: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(J, L) of the rows of all ranks, the same on each, from this rank's rows.  No checks."""
    rows, _, positives = sharded_dot_lse(
        f, g, _one(f), shards, strategy=strategy, mask_positives=not include_diagonal, need_cols=False, backend=backend
    )
    per_row = shards.total - (0 if include_diagonal else 1)
    el = _log_mean_exp(rows, shards.local * per_row)
    return merge.moments(positives.mean(), el, shards)


def _one(f: Tensor) -> Tensor:
    return f.new_ones((), dtype=torch.float64 if f.dtype == torch.float64 else torch.float32)


def _log_mean_exp(rows: Tensor, pairs: int) -> Tensor:
    """In float64, O(n): L is often near 0, where the logarithm of the sum less that of the count cancels."""
    rows64 = rows.double()
    return (rows64.logsumexp(0) - log_count(pairs, rows64)).to(rows.dtype)
