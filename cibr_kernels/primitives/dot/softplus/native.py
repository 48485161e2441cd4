"""dot_softplus in C++: csrc/dot/softplus."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.dispatch.native_call import DTYPES, call, scratch
from cibr_kernels.primitives.dot.lse.native import groups


def forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, row_weights: Tensor | None, col_weights: Tensor | None,
    row_ids: Tensor | None, col_ids: Tensor | None, first_positive: int, attract: bool, need_cols: bool, need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ().

    Row weights are given where dx or dy is needed.
    """
    (n, d), m = x.shape, y.shape[0]
    rows, cols = scale.new_empty(n), scale.new_empty(m if need_cols else 0)
    dx = scratch(x.shape if need_dx else (0,), x.dtype, x.device)
    dy = scratch(y.shape if need_dy else (0,), y.dtype, y.device)
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(bias)
    row_groups, col_groups = groups(row_ids, col_ids)
    call(
        "dot_softplus", "DotSoftplus", n * m * d, x=x, y=y, dtype=DTYPES[x.dtype], n=n, m=m, d=d, scale=scale.item(),
        bias=bias.item(), first_positive=first_positive, row_ids=row_groups, col_ids=col_groups, attract=attract,
        row_weight=row_weights, col_weight=col_weights, row_sum=rows, col_sum=cols, dx=dx, dy=dy, dscale=dscale,
        dbias=dbias,
    )  # fmt: skip
    return rows, cols, dx, dy, dscale, dbias
