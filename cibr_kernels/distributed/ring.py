"""`sharded_dot_lse` in memory of O(local rows): shards of y go round the ring of ranks, one hop per step.

At step k rank r multiplies its rows with the shard of rank r + k, while the next shard is on its way.

    forward    the log-sum-exp of a shard's columns travels with the shard, one step behind, and is home after the last
    backward   the shard travels with its columns' log-sum-exps and their gradients; blocks are computed again, and the
               sum of the shard's gradient travels one step behind, in float32

Per rank and direction: W - 1 shards of y, and W of what travels behind.  No tensor grows with the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from cibr_kernels.distributed.collectives import count
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.primitives.dot.lse.op import dot_lse_backward, dot_lse_forward

_WEIGHTLESS = 1e30  # the log-sum-exp of rows that have no gradient: exp(l - 1e30) is 0 for every l


def ring_dot_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shards: Shards,
    *,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mask_positives: bool,
    need_cols: bool,
    need_max: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """As `sharded_dot_lse`, for more than one rank.  The ids of all columns are on every rank: O(total) numbers."""
    options = (mask_positives, need_cols, need_max, backend)
    outputs = _Ring.apply(x.contiguous(), y.contiguous(), scale, row_ids, col_ids, shards, options)
    return outputs if need_max else outputs[:3]


class Hop:
    """Tensors on their way to the rank before this one, and those of the rank after it on their way here."""

    def __init__(self, kind: str, tensors: tuple[Tensor, ...], rows: int, shards: Shards) -> None:
        """`rows`: the length of what comes.  `kind`: the stream; hops of one stream arrive in order."""
        ranks = [dist.get_global_rank(shards.group, (shards.rank + d) % shards.world) for d in (-1, 1)]
        self.sent = tuple(t.contiguous() for t in tensors)
        self.received = tuple(t.new_empty((rows, *t.shape[1:])) for t in tensors)
        first = {"ahead": 0, "behind": 8}[kind]
        operations = [
            dist.P2POp(action, t, peer, shards.group, tag)
            for action, several, peer in zip((dist.isend, dist.irecv), (self.sent, self.received), ranks, strict=True)
            for tag, t in enumerate(several, first)
        ]
        self.requests = dist.batch_isend_irecv(operations)
        for ours, theirs in zip(self.sent, self.received, strict=True):
            count(f"ring {kind}", max(ours.numel(), theirs.numel()) * ours.itemsize)

    def wait(self) -> tuple[Tensor, ...]:
        """-> what has come, (rows, ...) each; what was sent may be overwritten."""
        for request in self.requests:
            request.wait()
        return self.received


@dataclass(frozen=True)
class _Blocks:
    """This rank's rows against one shard.  A shard with fewer rows than x takes the part of x: positives must fit."""

    x: Tensor  # (n, d)
    scale: Tensor
    row_ids: Tensor | None  # (n,)
    col_ids: Tensor | None  # (N,)
    shards: Shards
    mask_positives: bool
    need_cols: bool
    need_max: bool
    backend: str

    def _ids(self, step: int, swap: bool) -> tuple[Tensor | None, Tensor | None]:
        """The ids of this rank's rows and of the shard that is here at `step`."""
        if self.row_ids is None or self.col_ids is None:
            return None, None
        owner, rows = (self.shards.rank + step) % self.shards.world, self.shards.rows
        ids = self.row_ids, self.col_ids.split(rows)[owner].contiguous()
        return ids[::-1] if swap else ids

    def forward(self, y: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y (m, d) -> rows (n,), cols (m,) or (0,), positives (n,) if it is the own shard, maxima (n,), (m,) or (0,),
        the stash shift () that the block's backward wants; sums in float64."""
        mask, swap = step == 0 and self.mask_positives, len(y) < len(self.x)
        a, b = (y, self.x) if swap else (self.x, y)
        rows, cols, positives, row_max, col_max, stash_shift, _ = dot_lse_forward(
            a,
            b,
            self.scale,
            *self._ids(step, swap),
            None,
            0,
            mask,
            self.need_cols or swap,
            self.need_max,
            0,
            self.backend,
        )
        if swap:
            rows, cols, row_max, col_max = cols, rows, col_max, row_max
        return rows.double(), cols.double(), positives, row_max, col_max, stash_shift

    def backward(
        self,
        y: Tensor,
        step: int,
        rows: Tensor,
        g_rows: Tensor,
        cols: Tensor,
        g_cols: Tensor,
        positives: Tensor,
        g_positives: Tensor,
        stash_shift: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
        own, swap, none = step == 0, len(y) < len(self.x), rows.new_empty(0)
        a, b, needs = (y, self.x, (need_dy, need_dx)) if swap else (self.x, y, (need_dx, need_dy))
        if swap:
            if not self.need_cols:
                cols, g_cols = rows.new_full((len(y),), _WEIGHTLESS), rows.new_zeros(len(y))
            rows, g_rows, cols, g_cols = cols, g_cols, rows, g_rows
        elif not self.need_cols:
            cols = g_cols = none
        if not own:
            positives = g_positives = rows.new_zeros(len(a))
        da, db, dscale = dot_lse_backward(
            g_rows,
            g_cols,
            g_positives,
            a,
            b,
            self.scale,
            *self._ids(step, swap),
            None,
            rows,
            cols,
            positives,
            stash_shift,
            none,
            0,
            own and self.mask_positives,
            *needs,
            self.backend,
        )
        return (db, da, dscale) if swap else (da, db, dscale)


class _Ring(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_ids: Tensor | None,
        col_ids: Tensor | None,
        shards: Shards,
        options: tuple[bool, bool, bool, str],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `ring_dot_lse`; keeps the inputs, the results and a number per step."""
        blocks = _Blocks(x, scale, row_ids, col_ids, shards, *options)
        need_cols, need_max = blocks.need_cols, blocks.need_max
        shard, behind = y, None
        rows = cols = positives = row_max = col_max = x.new_empty(0)
        stash_shifts = []
        for step in range(shards.world):
            coming = shards.rows[(shards.rank + step + 1) % shards.world]
            ahead = Hop("ahead", (shard,), coming, shards) if step + 1 < shards.world else None
            more_rows, more_cols, own_positives, more_row_max, more_col_max, stash_shift = blocks.forward(shard, step)
            stash_shifts.append(stash_shift)
            if step == 0:
                rows, positives, row_max = more_rows, own_positives, more_row_max
            else:
                rows = torch.logaddexp(rows, more_rows)
                row_max = torch.maximum(row_max, more_row_max) if need_max else row_max
            if need_cols:
                if behind is None:
                    cols, col_max = more_cols, more_col_max
                else:
                    earlier, *earlier_max = behind.wait()
                    cols = torch.logaddexp(earlier, more_cols)
                    col_max = torch.maximum(earlier_max[0], more_col_max) if need_max else col_max
                behind = Hop("behind", (cols, col_max) if need_max else (cols,), coming, shards)
            if ahead is not None:
                (shard,) = ahead.wait()
        if behind is not None:
            cols, *home = behind.wait()
            col_max = home[0] if home else col_max
        col_max = col_max if need_cols else col_max[:0]
        rows, cols = rows.to(positives.dtype), (cols if need_cols else cols[:0]).to(positives.dtype)
        ctx.save_for_backward(y, rows, cols, positives, x, scale, row_ids, col_ids, *stash_shifts)
        ctx.options, ctx.shards = options, shards
        ctx.mark_non_differentiable(row_max, col_max)
        return rows, cols, positives, row_max, col_max

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_rows: Tensor, g_cols: Tensor, g_positives: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """(n,), (n,) or (0,), (n,) -> the gradients of x (n, d), y (n, d) and scale (), None unless needed."""
        y, rows, cols, positives, x, scale, row_ids, col_ids, *stash_shifts = ctx.saved_tensors
        blocks, shards = _Blocks(x, scale, row_ids, col_ids, ctx.shards, *ctx.options), ctx.shards
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        g_rows, g_positives = g_rows.contiguous(), g_positives.contiguous()
        shard: tuple[Tensor, ...] = (y, cols, g_cols.contiguous()) if blocks.need_cols else (y,)
        behind = None
        wide = x.dtype if x.itemsize >= 4 else torch.float32
        dx, dy, dscale = x.new_empty(0), y.new_empty(0), torch.zeros_like(scale)
        for step in range(shards.world):
            coming = shards.rows[(shards.rank + step + 1) % shards.world]
            ahead = Hop("ahead", shard, coming, shards) if step + 1 < shards.world else None
            sums, g_sums = (shard[1], shard[2]) if blocks.need_cols else (rows[:0], rows[:0])
            more_dx, more_dy, more_dscale = blocks.backward(
                shard[0],
                step,
                rows,
                g_rows,
                sums,
                g_sums,
                positives,
                g_positives,
                stash_shifts[step],
                need_x or not need_y,
                need_y,
            )
            dx, dscale = more_dx.to(wide) if step == 0 else dx.add_(more_dx), dscale + more_dscale
            if need_y:
                dy = more_dy.to(wide) if behind is None else behind.wait()[0].add_(more_dy)
                behind = Hop("behind", (dy,), coming, shards)
            del more_dx, more_dy
            if ahead is not None:
                shard = ahead.wait()
        if behind is not None:
            (dy,) = behind.wait()
        grads = dx.to(x.dtype) if need_x else None, dy.to(y.dtype) if need_y else None, dscale if need_scale else None
        return *grads, None, None, None, None
