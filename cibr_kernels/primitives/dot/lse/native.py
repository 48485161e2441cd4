"""dot_lse in C++: csrc/dot/lse."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.dispatch.native_call import DTYPES, call, scratch

_BLOCK = 32  # columns of a block of the stash: csrc/dot/engine.h, kBlock


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Blocks of 32 columns, (m / 32, n, 32) in one dimension: compilers tell a size of 1 from others.

    bfloat16 for bfloat16 features only, elsewhere it would cost 1e-3 in the gradients.
    """
    return ((m + _BLOCK - 1) // _BLOCK * n * _BLOCK,), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def groups(row_ids: Tensor | None, col_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """ids (n,), (m,) -> their groups, numbered from 0, int32: the kernels compare a vector of them with one."""
    if row_ids is None or col_ids is None:
        return None, None
    _, numbers = torch.unique(torch.cat((row_ids, col_ids)), return_inverse=True)
    n = row_ids.shape[0]
    return numbers[:n].int(), numbers[n:].int()


def _run(
    kernel: str, struct: str, x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None,
    first_positive: int, mask_positives: bool, stash: Tensor, **fields: Tensor | float,
) -> None:  # fmt: skip
    row_groups, col_groups = groups(row_ids, col_ids)
    (n, d), m = x.shape, y.shape[0]
    call(
        kernel,
        struct,
        n * m * d,
        x=x,
        y=y,
        dtype=DTYPES[x.dtype],
        n=n,
        m=m,
        d=d,
        scale=scale.item(),
        row_ids=row_groups,
        col_ids=col_groups,
        first_positive=first_positive,
        mask_positives=mask_positives,
        stash=stash,
        stash_dtype=DTYPES[stash.dtype],
        **fields,
    )


def forward(
    x: Tensor, y: Tensor, scale: Tensor, row_ids: Tensor | None, col_ids: Tensor | None, first_positive: int,
    mask_positives: bool, need_cols: bool, need_max: bool, stash: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), positives (n,), the maxima of rows and cols (n,), (m,) or (0,), stash shift ().

    Fills the stash.
    """
    n, m = x.shape[0], y.shape[0] if need_cols else 0
    shapes = (n,), (m,), (n,), (n if need_max else 0,), (m if need_max else 0,), ()
    rows, cols, positives, row_max, col_max, stash_shift = outputs = tuple(scale.new_empty(s) for s in shapes)
    _run(
        "dot_lse_forward",
        "DotForward",
        x,
        y,
        scale,
        row_ids,
        col_ids,
        first_positive,
        mask_positives,
        stash,
        row_lse=rows,
        col_lse=cols,
        positives=positives,
        row_max=row_max,
        col_max=col_max,
        stash_shift=stash_shift,
    )
    return outputs


def backward(
    g_rows: Tensor, g_cols: Tensor, g_positives: Tensor, x: Tensor, y: Tensor, scale: Tensor,
    row_ids: Tensor | None, col_ids: Tensor | None, rows: Tensor, cols: Tensor, positives: Tensor,
    stash_shift: Tensor, stash: Tensor, first_positive: int, mask_positives: bool, need_dx: bool, need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    dx = scratch(x.shape if need_dx else (0,), x.dtype, x.device)
    dy = scratch(y.shape if need_dy else (0,), y.dtype, y.device)
    dscale = torch.empty_like(scale)
    _run(
        "dot_lse_backward",
        "DotBackward",
        x,
        y,
        scale,
        row_ids,
        col_ids,
        first_positive,
        mask_positives,
        stash,
        row_lse=rows,
        row_weight=g_rows,
        col_lse=cols,
        col_weight=g_cols,
        positive_grad=g_positives,
        stash_shift=stash_shift.item(),
        dx=dx,
        dy=dy,
        dscale=dscale,
    )
    return dx, dy, dscale
