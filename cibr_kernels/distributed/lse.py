"""`dot_lse` of this rank's rows and columns within the matrix of all ranks' rows.

    rows_i = log sum_j exp l_ij over the columns of all ranks      cols_i = the same over the rows of all ranks

Rows are local, columns global: `y` is gathered, the columns' partial sums are exchanged.  With n local and N total rows
of width d and e bytes a number, a rank's forward receives (N - n) (d e + 4) bytes and its backward sends
(N - n) (max(e, 4) d + 4); the passes over pairs are those of dot_lse on n x N.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.collectives import gather
from cibr_kernels.distributed.ring import ring_dot_lse
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.ops.dot_lse.op import dot_lse

STRATEGIES = ("gather", "ring")


def sharded_dot_lse(
    x: Tensor,  # (n, d)
    y: Tensor,  # (n, d)
    scale: Tensor,  # ()
    shards: Shards,
    *,
    strategy: str = "gather",
    mask_positives: bool = True,
    need_cols: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """-> rows (n,), cols (n,) ((0,) unless needed), positives (n,) of this rank's rows of x and y.  No checks."""
    options: dict[str, Any] = {"mask_positives": mask_positives, "need_cols": need_cols, "backend": backend}
    if strategy == "ring" and shards.world > 1:
        return ring_dot_lse(x, y, scale, shards, **options)
    rows, cols, positives = dot_lse(x, gather(y, shards), scale, offset=shards.offset, **options)
    return rows, merge.columns(cols, shards) if need_cols else cols, positives
