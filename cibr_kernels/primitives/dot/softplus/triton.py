"""dot_softplus in Triton: launches and workspace.  The kernels are in triton_kernels.py, tiles are dot_lse's.

Panels of rows: each tile of logits is summed where it was made, and a panel's sums of tiles are folded into the totals.
That is all without weights: 1 pass.  With weights the same kernel writes G of the panel in the features' dtype, then
two of the vendor's matmuls, dx = G y and dy += G^T x, with float32 sums: 3 passes.  G is made times a power of two
found on the device, so that float16 keeps its digits; dscale = <x, dx> / scale, dbias is a sum of float32 tiles of G.
What that cannot save: of the largest weight's pairs, float16 loses those with t < -17 by and by and t < -26 altogether,
which shows where all pairs are such; rows, cols and dbias are float32 to the end.

Workspace in bytes, with 128 x 128 tiles:
    sums        rows / 128 * 8 m + O(n + m), rows = Panels.rows or .gradient_rows
    gradients   G + 4 rows of G * d + 4 m d + 4 n m / 128^2
    both        itemsize * (n + m) d where 32 does not divide d
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.dot.lse.triton_configs import Config, Tiles, blocks, target_name
from cibr_kernels.primitives.dot.problem import SoftplusProblem
from cibr_kernels.primitives.dot.triton_parts import (
    BLOCK_R,
    aligned,
    both_features_gradients,
    cols_of_panel,
    features_block,
    features_gradient,
    multiply_into,
    pitch,
    rows_of_panel,
    total,
)  # fmt: skip

BLOCK_T, BLOCK_L = 32, 32  # a fold: sums of tiles at a time, rows or columns of a program
BLOCK_P = 4096  # features that a program of dot_softplus_poison_kernel looks at
ENDS = 128  # bytes behind dx and dy: dscale, and dbias in the middle

# With weights or ids, by target, for features of 2 bytes: four numbers for each pair live at once, dot_lse has two.
CONFIGS = {
    "sm_80": Config(64, 128, 32, 4, 4),
    "sm_90": Config(64, 128, 64, 4, 3),
    "sm_100": Config(128, 64, 64, 8, 5),
    "sm_120": Config(64, 128, 32, 8, 3),
    "hip": Config(64, 128, 32, 8, 2),
}


@dataclass(frozen=True)
class Panels:
    """Rows at a time, multiples of 128; what they cost is above."""

    rows: int = 8192
    gradient_rows: int = 8192
    gradient_cols: int = 16384  # at most, where no sums of columns are wanted
    gradient_bytes: int = 128 << 20  # of G without those, or twice those of the features, whichever is more
    whole_bytes: int = 1 << 30  # of G with them, which has all columns


PANELS = Panels()


def forward(
    problem: SoftplusProblem, row_weights: Tensor | None, col_weights: Tensor | None, need_cols: bool, need_dx: bool,
    need_dy: bool, panels: Panels = PANELS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ().
    dx and dy are float32 for float16.

    Without row_weights there are no gradients: dscale and dbias are 0.  What is not finite makes all NaN.
    """
    scale, width, gradient = problem.scale, problem.sizes[2], row_weights is not None
    problem = replace(
        problem, x=aligned(problem.x), y=aligned(problem.y), row_ids=_contiguous(problem.row_ids),
        col_ids=_contiguous(problem.col_ids),
    )  # fmt: skip
    rows = scale.new_empty(problem.sizes[0])
    exponent = scale.new_empty(()) if row_weights is None else _exponent(row_weights, col_weights)
    sweep = _Sweep(
        problem, _poison(problem.x, problem.y), exponent, _contiguous(row_weights), _contiguous(col_weights), need_cols,
        panels,
    )  # fmt: skip

    def fold(parts: Tensor, first: int, end: int, count: int) -> None:
        _fold(parts, rows[first:end], count)

    cols, dx, dy, along = sweep.run(fold, need_dx or not need_dy, need_dy)  # dscale needs one of the two
    if not gradient:
        return rows, cols, dx, dy, torch.zeros_like(scale), torch.zeros_like(scale)
    dx, dy = (g[:, :width].contiguous() if need else g.new_empty(0) for g, need in ((dx, need_dx), (dy, need_dy)))
    return rows, cols, dx, dy, total(along), total(sweep.totals)


def mean_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    share: float,
    need_dx: bool,
    need_dy: bool,
    panels: Panels = PANELS,
) -> tuple[Tensor, ...]:
    """-> share (the sum of softplus over all pairs, signed) () and, where a gradient is needed, what `gradients` reads.

    The loss of siglip: all weights are `share`, and the positives, row i with row i, are part of it.
    """
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    n, width, new = x.shape[0], x.shape[1], scale.new_empty
    x, y = aligned(x), aligned(y)
    gradient, programs = need_dx or need_dy, blocks(n, BLOCK_R)
    poison, positives, g_positives, weights, exponent = new(programs), new(n), new(n), new(n), new(())
    triton_call.launch(
        kernels.siglip_loss_positives_kernel, (programs,),
        {"x": x, "y": y, "scale": scale, "bias": bias, "poison": poison, "positives": positives, "share": share,
         "g_positives": g_positives, "weights": weights, "exponent": exponent, "unit": _unit(share), "n": n,
         "d": x.shape[1]},
        {"BLOCK_R": BLOCK_R, "BLOCK_D": features_block(x)},
    )  # fmt: skip
    problem = SoftplusProblem(x, y, scale, None, None, 0, bias, False)
    sweep = _Sweep(problem, total(poison), exponent, weights if gradient else None, None, False, panels, g_positives)
    losses = new(blocks(n, BLOCK_L))
    g_sums = sweep.totals[: len(losses)] if gradient else None

    def fold(parts: Tensor, first: int, end: int, count: int) -> None:
        at = first // BLOCK_L
        triton_call.launch(
            kernels.siglip_loss_losses_kernel, (blocks(end - first, BLOCK_L),),
            {"parts": parts, "positives": positives[first:end], "g_positives": g_positives[first:end],
             "losses": losses[at:], "g_sums": None if g_sums is None else g_sums[at:], "share": share,
             "rows": end - first, "tiles": count},
            {"BLOCK_T": BLOCK_T, "BLOCK_L": BLOCK_L},
        )  # fmt: skip

    _, dx, dy, along = sweep.run(fold, need_dx or not need_dy, need_dy)
    loss = total(losses)
    if not gradient:
        return (loss,)
    if sweep.block is not None and dx.shape[1] == width:
        _, _, dscale, dbias = gradients((sweep.block,), x)
        total(along, dscale), total(sweep.totals, dbias)
        return loss, sweep.block
    dx, dy = (g[:, :width].contiguous() if need else g.new_empty(0) for g, need in ((dx, need_dx), (dy, need_dy)))
    return loss, dx, dy, total(along), total(sweep.totals)


def gradients(kept: Sequence[Tensor], x: Tensor) -> Sequence[Tensor]:
    """What `mean_loss` kept -> dx, dy (n, d), each empty unless needed, dscale (), dbias (): views of its one block,
    where it has made all at once.  To a step of few rows each tensor more is time of the host."""
    if len(kept) > 1:
        return kept
    (block,), count = kept, x.numel()
    ends = block[2 * count :].view(torch.float32)
    return block[:count].view_as(x), block[count : 2 * count].view_as(x), ends[0], ends[ends.numel() // 2]


def times(g: Tensor, x: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """g () times all gradients, as `mean_loss` kept them: dx and dy in the dtype of x (n, d), dscale, dbias."""
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    dx, dy, dscale, dbias = gradients(kept, x)
    outputs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(g), torch.empty_like(g)
    count, x_blocks = x.numel(), blocks(x.numel(), BLOCK_P)
    names = ("dx_out", "dy_out", "dscale_out", "dbias_out")
    triton_call.launch(
        kernels.loss_times_kernel, (2 * x_blocks,),
        {"g": g, "dx": dx, "dy": dy, "dscale": dscale, "dbias": dbias, **dict(zip(names, outputs, strict=True)),
         "x_count": count, "y_count": count, "x_blocks": x_blocks},
        {"BLOCK": BLOCK_P},
    )  # fmt: skip
    return outputs


def _unit(share: float) -> float:
    """The exponent of equal weights: triton_backward.dot_exponent_kernel's."""
    return 13.0 - math.floor(math.log2(share)) if 1e-25 < share < 1e25 else 0.0


class _Sweep:
    """One pass over all tiles: sums of softplus, and with weights G and what the vendor's matmuls make of it.

    totals: the sums of G of each program; before them, with g_positives (n,), the gradients of positives, room for sums
    of those.  block: with those, what dx and dy lie in where one launch makes both; `gradients` knows where.
    """

    def __init__(
        self, problem: SoftplusProblem, poison: Tensor, exponent: Tensor, g_rows: Tensor | None, g_cols: Tensor | None,
        need_cols: bool, panels: Panels, g_positives: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.problem, self.exponent, self.g_cols = problem, exponent, g_cols
        self.block: Tensor | None = None
        self.need_cols, self.gradient, self.g_positives = need_cols, g_rows is not None, g_positives
        (n, m, _), x = problem.sizes, problem.x
        self.tiles = _tiles(x) if self.gradient or problem.grouped else Tiles.of("scores", x)
        self.height, self.width = _panel_shape(problem, need_cols, self.gradient, panels)
        block_n = self.tiles.config.block_n
        heights = [min(self.height, n - first) for first in range(0, n, self.height)]
        widths = [min(self.width, m - left) for left in range(0, m, self.width)]
        self.grids = {(r, c): self._grid(r, c) for r in set(heights) for c in set(widths)}
        self.col_tiles = sum(blocks(c, block_n) for c in widths)
        programs = sum(self.grids[r, c][0] * blocks(c, block_n) for r in heights for c in widths)
        self.first_part = 0 if g_positives is None else blocks(n, BLOCK_L)
        self.totals = problem.scale.new_empty(self.first_part + programs if self.gradient else 0)
        self.arguments: dict[str, Any] = {
            "scale": problem.scale, "bias": problem.bias, "poison": poison, "g_rows": g_rows, "exponent": exponent,
            "totals": self.totals,
        }  # fmt: skip
        self.constants = {
            **self.tiles.constants, "IDS": problem.grouped, "ATTRACT": problem.attract and problem.grouped,
            "COLS": need_cols, "GRADIENT": self.gradient, "COL_WEIGHTS": g_cols is not None,
            "STRIPS": self.tiles.strips,
        }  # fmt: skip

    def _grid(self, rows: int, cols: int) -> tuple[int, int]:
        """-> strips of a panel, tiles of a strip."""
        k = self.tiles.strip_tiles(rows, cols)
        return blocks(rows, k * self.tiles.config.block_m), k

    def run(
        self, fold: Callable[[Tensor, int, int, int], None], with_dx: bool, with_dy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, parts of <x, dx> or <y, dy> / scale.

        fold(parts (count or more, rows), first, end, count) takes the sums of each tile's rows [first, end).
        """
        (n, m, d), x, y, new = self.problem.sizes, self.problem.x, self.problem.y, self.problem.scale.new_empty
        with_dx, with_dy = with_dx and self.gradient, with_dy and self.gradient
        most_strips = max(strips for strips, _ in self.grids.values())
        cols = new(m if self.need_cols else 0)
        part_rows, part_cols = new(self.col_tiles * self.height), new((1 + most_strips, cols.numel()))
        part_cols[0].zero_()  # the panels before
        panel = x.new_empty(self.height * pitch(self.width) if self.gradient else 0)
        pairs = self.g_positives
        together = self.height == n and with_dx and with_dy and pairs is not None  # both ends in one launch
        made = x.new_empty(0, dtype=early_dtype(x.dtype))
        dx = made.new_empty(x.shape if with_dx and not together else 0)
        dx_sums, dy_sums = new((self.height, d) if with_dx else 0), new((m, d) if with_dy else 0)
        along_x = new(blocks(n, BLOCK_R) if with_dx else 0)
        first_part = self.first_part
        for first in range(0, n, self.height):
            end, tiles_before = min(first + self.height, n), 0
            for left in range(0, m, self.width):
                right = min(left + self.width, m)
                sums = {"row_sum": part_rows[tiles_before * (end - first) :], "col_sum": part_cols[1:]}
                p = self._tile(panel, first, end, left, right, {**sums, "first_part": first_part})
                tiles = blocks(right - left, self.tiles.config.block_n)
                tiles_before += tiles
                first_part += self.grids[end - first, right - left][0] * tiles
                if with_dx:
                    multiply_into(dx_sums[: end - first], p, y[left:right], accumulate=left > 0)
                if with_dy:
                    multiply_into(dy_sums[left:right], p.T, x[first:end], accumulate=first > 0)
            fold(part_rows, first, end, tiles_before)
            if self.need_cols:
                _fold(part_cols, cols if end == n else part_cols[0], 1 + self.grids[end - first, m][0])
            if with_dx and not together:
                self._scale(dx_sums, x, y, slice(first, end), dx, along_x)
        del panel, p, part_rows, sums  # what follows takes their memory
        if together and pairs is not None:
            self.block = made.new_empty(2 * x.numel() + ENDS // made.itemsize)
            dx, dy, *_ = gradients((self.block,), x)
            both_features_gradients(
                dx_sums, dy_sums, x, y, dx, dy, along_x, g_positives=pairs, scale=self.problem.scale,
                exponent=self.exponent, first_positive=0,
            )  # fmt: skip
            return cols, dx, dy, along_x
        if not with_dy:
            return cols, dx, dx.new_empty(0), along_x
        dy, along_y = dx.new_empty(y.shape), new(blocks(m, BLOCK_R))
        self._scale(dy_sums, y, x, slice(0, m), dy, along_y)
        return cols, dx, dy, along_x if with_dx else along_y

    def _tile(self, panel: Tensor, first: int, end: int, left: int, right: int, sums: dict[str, Any]) -> Tensor:
        """Launches rows [first, end) and columns [left, right) -> G of them, in the memory of panel."""
        from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

        problem, count = self.problem.columns(left, right), end - first
        _, width, d = problem.sizes
        strips, strip_tiles = self.grids[count, width]
        g = panel[: count * pitch(width)].view(count, -1) if self.gradient else panel
        triton_call.launch(
            kernels.dot_softplus_sweep_kernel, (strips * blocks(width, self.tiles.config.block_n),),
            {**self.arguments, **self.tiles.operands(problem.x, problem.y), **sums, "p": self.tiles.output(g),
             "row_ids": problem.row_ids, "col_ids": problem.col_ids,
             "g_cols": None if self.g_cols is None else self.g_cols[left:right], "first_row": first, "n": end,
             "m": width, "d": d, "first_positive": problem.first_positive, "rows": count, "pitch": pitch(width),
             "strips": strips, "strip_tiles": strip_tiles},
            self.constants, **self.tiles.options,
        )  # fmt: skip
        return g[:, :width] if self.gradient else g

    def _scale(self, sums: Tensor, own: Tensor, partner: Tensor, at: slice, out: Tensor, along: Tensor) -> None:
        """out = scale (2^-exponent sums + the positives' part) for rows `at`; along = parts of <own, out> / scale."""
        pairs, scale = self.g_positives, self.problem.scale
        features_gradient(
            sums, own[at], own[:0] if pairs is None else partner, out[at], along[at.start // BLOCK_R :],
            g_positives=scale if pairs is None else pairs[at], scale=scale, exponent=self.exponent, shift=at.start,
            g_shift=0,
        )  # fmt: skip


def _panel_shape(problem: SoftplusProblem, need_cols: bool, gradient: bool, panels: Panels) -> tuple[int, int]:
    """Rows and columns at a time."""
    (n, m, d), itemsize = problem.sizes, problem.x.element_size()
    if not gradient:
        return min(panels.rows, n), m
    if need_cols:
        return rows_of_panel(panels.gradient_rows, panels.whole_bytes, n, m, itemsize), m
    rows = min(panels.gradient_rows, n)
    return rows, cols_of_panel(panels.gradient_cols, panels.gradient_bytes, rows, n, m, d, itemsize)


def _tiles(x: Tensor) -> Tiles:
    """dot_lse's way to make tiles of scores, in tiles that leave registers for what is made of them."""
    tiles = Tiles.of("gradient", x)
    config = CONFIGS[target_name(x.device)] if x.element_size() == 2 else tiles.config
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return replace(tiles, config=config, constants={**tiles.constants, **sizes})


def _fold(parts: Tensor, out: Tensor, count: int) -> None:
    """out (l,) = sum of the first `count` rows of parts (count or more, l), which out may be the first of."""
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    triton_call.launch(
        kernels.sums_reduce_kernel, (blocks(out.numel(), BLOCK_L),),
        {"partials": parts, "out": out, "blocks": count, "width": out.numel()},
        {"BLOCK_R": BLOCK_T, "BLOCK_H": BLOCK_L},
    )  # fmt: skip


def _poison(x: Tensor, y: Tensor) -> Tensor:
    """(): 0, or NaN where a feature is not finite."""
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    x_blocks, y_blocks = blocks(x.numel(), BLOCK_P), blocks(y.numel(), BLOCK_P)
    parts = torch.empty(x_blocks + y_blocks, dtype=torch.float32, device=x.device)
    triton_call.launch(
        kernels.dot_softplus_poison_kernel, (x_blocks + y_blocks,),
        {"x": x, "y": y, "parts": parts, "x_count": x.numel(), "y_count": y.numel(), "x_blocks": x_blocks},
        {"BLOCK": BLOCK_P},
    )  # fmt: skip
    return total(parts)


def _exponent(row_weights: Tensor, col_weights: Tensor | None) -> Tensor:
    """(): the power of two of G's unit, triton_backward.dot_exponent_kernel's."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    exponent = row_weights.new_empty((), dtype=torch.float32)
    cols = row_weights.new_empty(0) if col_weights is None else col_weights
    triton_call.launch(
        kernels.dot_exponent_kernel, (1,),
        {"g_rows": row_weights.contiguous(), "g_cols": cols.contiguous(), "exponent": exponent,
         "n": row_weights.numel(), "m": cols.numel()},
        {"BLOCK": 4096}, num_warps=8,
    )  # fmt: skip
    return exponent


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
