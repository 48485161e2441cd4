"""`dot_softplus` of this rank's rows and columns within the matrix of all ranks' rows: rows local, columns global.

"gather" brings the columns' features to every rank and sums their gradients in the backward.  In the "ring", shards of
y go round as in `ring_dot_lse`, and because the gradients are made in the forward, those of a shard travel one step
behind it and are home when the forward ends: the backward only scales them and talks to nobody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from cibr_kernels.distributed.collectives import exchange, gather
from cibr_kernels.distributed.ring import Hop
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums, dot_softplus_total


def sharded_dot_softplus(
    x: Tensor,  # (n, d)
    y: Tensor,  # (n, d)
    scale: Tensor,  # ()
    bias: Tensor,  # ()
    row_weights: Tensor,  # (n,)
    col_weights: Tensor | None,  # (n,), of this rank's columns
    shards: Shards,
    *,
    row_ids: Tensor | None = None,  # (n,)
    col_ids: Tensor | None = None,  # (N,), of the columns of all ranks
    attract: bool = False,
    strategy: str = "gather",
    backend: str = "auto",
) -> Tensor:
    """-> (): `dot_softplus` of this rank's rows with the columns of all ranks.  No checks.

    The weights have a gradient with "gather" only.
    """
    weights = None if col_weights is None else gather(col_weights, shards)
    if strategy == "ring" and shards.world > 1:
        return _Ring.apply(
            x.contiguous(),
            y.contiguous(),
            scale,
            bias,
            row_weights.detach(),
            weights,
            row_ids,
            col_ids,
            attract,
            shards,
            backend,
        )
    return dot_softplus(
        x,
        gather(y, shards),
        scale,
        bias,
        row_weights,
        weights,
        row_ids=row_ids,
        col_ids=col_ids,
        first_positive=shards.offset,
        attract=attract,
        backend=backend,
    )


def sharded_dot_softplus_sums(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, shards: Shards, **options: Any
) -> tuple[Tensor, Tensor]:
    """-> rows (n,) and cols (n,) of this rank's rows and columns, over those of all ranks.  No checks.

    options: row_ids, col_ids, attract and backend, as of `sharded_dot_softplus`.
    """
    rows, cols = dot_softplus_sums(x, gather(y, shards), scale, bias, first_positive=shards.offset, **options)
    if shards.world == 1:
        return rows, cols
    parts = exchange(cols, shards.rows, (shards.local,) * shards.world, shards.group)
    return rows, parts.view(shards.world, shards.local).sum(0)


class _Ring(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        row_weights: Tensor,
        col_weights: Tensor | None,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        attract: bool,
        shards: Shards,
        backend: str,
    ) -> Tensor:
        """-> total (); keeps its gradients."""
        need_x, need_y, need_scale, need_bias, *_ = ctx.needs_input_grad
        need_dx = need_x or ((need_scale or need_bias) and not need_y)
        wide = x.dtype if x.itemsize >= 4 else torch.float32
        total, dscale, dbias = (torch.zeros_like(scale, dtype=torch.float64) for _ in range(3))
        dx, dy, shard, behind = x.new_empty(0), y.new_empty(0), y, None
        for step in range(shards.world):
            owner = (shards.rank + step) % shards.world
            coming = shards.rows[(owner + 1) % shards.world]
            ahead = Hop("ahead", (shard,), coming, shards) if step + 1 < shards.world else None
            ids = (None, None) if col_ids is None else (row_ids, col_ids.split(shards.rows)[owner].contiguous())
            weights = None if col_weights is None else col_weights.split(shards.rows)[owner].contiguous()
            part, _, _, more_dx, more_dy, more_dscale, more_dbias = dot_softplus_total(
                x,
                shard,
                scale,
                bias,
                row_weights,
                weights,
                *ids,
                0 if step == 0 else len(shard),
                attract,
                need_dx,
                need_y,
                backend,
            )
            total, dscale, dbias = total + part, dscale + more_dscale, dbias + more_dbias
            dx = more_dx.to(wide) if step == 0 else dx.add_(more_dx)
            if need_y:
                dy = more_dy.to(wide) if behind is None else behind.wait()[0].add_(more_dy)
                behind = Hop("behind", (dy,), coming, shards)
            if ahead is not None:
                (shard,) = ahead.wait()
        if behind is not None:
            (dy,) = behind.wait()
        made = early_dtype(x.dtype)
        ctx.dtypes = x.dtype, y.dtype, scale.dtype, bias.dtype
        ctx.save_for_backward(dx.to(made), dy.to(made), dscale.to(scale.dtype), dbias.to(scale.dtype))
        return total.to(scale.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """() -> the gradients of x (n, d), y (n, d), scale () and bias (), None unless needed."""
        grads = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *((t * g).to(dtype) if need else None for t, dtype, need in grads), *(None,) * 7
