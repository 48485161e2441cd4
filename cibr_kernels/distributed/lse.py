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
from cibr_kernels.primitives.dot.lse.op import dot_lse

STRATEGIES = ("gather", "ring")


def sharded_dot_lse(
    x: Tensor,  # (n, d)
    y: Tensor,  # (n, d)
    scale: Tensor,  # ()
    shards: Shards,
    *,
    row_ids: Tensor | None = None,  # (n,)
    col_ids: Tensor | None = None,  # (N,), of the columns of all ranks
    strategy: str = "gather",
    mask_positives: bool = True,
    row_limits: Tensor | None = None,
    need_cols: bool = True,
    need_max: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """`dot_lse` of this rank's rows: rows (n,), cols (n,) of its own columns ((0,) unless needed), positives (n,), and
    with need_max the largest logits (n,) and (n,) or (0,).  No checks.  A ring has no row_limits."""
    options: dict[str, Any] = {
        "row_ids": row_ids,
        "col_ids": col_ids,
        "mask_positives": mask_positives,
        "need_cols": need_cols,
        "need_max": need_max,
        "backend": backend,
    }
    if strategy == "ring" and shards.world > 1:
        return ring_dot_lse(x, y, scale, shards, **options)
    rows, cols, positives, *maxima = dot_lse(
        x, gather(y, shards), scale, first_positive=shards.offset, row_limits=row_limits, **options
    )
    if need_cols:
        cols = merge.columns(cols, shards)
        maxima[1:] = [merge.largest(t, shards) for t in maxima[1:]]
    return rows, cols, positives, *maxima
