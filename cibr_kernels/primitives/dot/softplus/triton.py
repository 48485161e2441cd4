"""dot_softplus in Triton: launches and workspace.  The kernels are in triton_kernels.py, tiles are dot_lse's.

Panels of rows: each tile of logits is summed where it was made, and a panel's sums of tiles are folded into the totals.
That is all without weights: 1 pass.  With weights the same kernel writes G of the panel in the features' dtype, then
two of the vendor's matmuls, dx = G y and dy += G^T x, with float32 sums: 3 passes.  G is made times a power of two
found on the device, so that float16 keeps its digits; dscale = <x, dx> / scale, dbias is a sum of float32 tiles of G.
What that cannot save: of the largest weight's pairs, float16 loses those with t < -17 by and by and t < -26 altogether,
which shows where all pairs are such; rows, cols and dbias are float32 to the end.

Workspace in bytes, with 128 x 128 tiles:
    sums        rows / 128 * 8 m + O(n + m), rows = panels.rows or .gradient_rows
    gradients   rows of G * (itemsize * m + 4 d) + 4 m d + 4 n m / 128^2
    both        itemsize * (n + m) d where 32 does not divide d
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.dot.lse.triton import (
    BLOCK_R,
    aligned,
    features_gradient,
    multiply_into,
    pitch,
    rows_of_panel,
    total,
)  # fmt: skip
from cibr_kernels.primitives.dot.lse.triton_configs import Config, Tiles, blocks, target_name
from cibr_kernels.primitives.dot.problem import SoftplusProblem

BLOCK_T, BLOCK_L = 32, 32  # a fold: sums of tiles at a time, rows or columns of a program
BLOCK_P = 4096  # features that a program of poison_kernel looks at

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
    gradient_rows: int = 8192  # at most
    gradient_bytes: int = 1 << 30  # of G: dot_lse's Panels


panels = Panels()


def forward(
    problem: SoftplusProblem, row_weights: Tensor | None, col_weights: Tensor | None, need_cols: bool, need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ().
    dx and dy are float32 for float16.

    Without row_weights there are no gradients: dscale and dbias are 0.  What is not finite makes all NaN.
    """
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    (n, m, width), scale = problem.sizes, problem.scale
    x, y = aligned(problem.x), aligned(problem.y)
    new, d, row_pitch = scale.new_empty, x.shape[1], pitch(m)
    gradient = row_weights is not None
    with_dx, with_dy = gradient and (need_dx or not need_dy), gradient and need_dy  # dscale needs one of the two
    tiles = _tiles(x) if gradient or problem.grouped else Tiles.of("scores", x)
    height = min(panels.rows, n)
    if gradient:
        height = rows_of_panel(panels.gradient_rows, panels.gradient_bytes, n, m, x.element_size())
    heights = [min(height, n - first) for first in range(0, n, height)]
    strip_tiles = [tiles.strip_tiles(rows, m) for rows in heights]
    strips = [blocks(rows, k * tiles.config.block_m) for rows, k in zip(heights, strip_tiles, strict=True)]
    col_tiles = blocks(m, tiles.config.block_n)

    rows, cols = new(n), new(m if need_cols else 0)
    part_rows, part_cols = new(col_tiles * height), new((1 + max(strips), cols.numel()))
    part_cols[0].zero_()  # the panels before
    totals = new(sum(strips) * col_tiles if gradient else 0)
    made = early_dtype(x.dtype)
    dx = x.new_empty(x.shape if with_dx else 0, dtype=made)
    dy = y.new_empty(y.shape if with_dy else 0, dtype=made)
    dx_sums, dy_sums = new((height, d) if with_dx else 0), new((m, d) if with_dy else 0)
    along_x, along_y = new(blocks(n, BLOCK_R) if with_dx else 0), new(blocks(m, BLOCK_R) if with_dy else 0)
    panel = x.new_empty((height, row_pitch) if gradient else 0)
    exponent = new(()) if row_weights is None else _exponent(row_weights, col_weights)  # read with weights only
    arguments: dict[str, Any] = {
        **tiles.operands(x, y), "row_ids": _contiguous(problem.row_ids), "col_ids": _contiguous(problem.col_ids),
        "scale": scale, "bias": problem.bias, "poison": _poison(x, y), "g_rows": _contiguous(row_weights),
        "g_cols": _contiguous(col_weights),
        "exponent": exponent, "row_sum": part_rows, "col_sum": part_cols[1:], "totals": totals, "m": m, "d": d,
        "first_positive": problem.first_positive, "pitch": row_pitch,
    }  # fmt: skip
    constants = {
        **tiles.constants, "IDS": problem.grouped, "ATTRACT": problem.attract and problem.grouped, "COLS": need_cols,
        "GRADIENT": gradient, "COL_WEIGHTS": col_weights is not None, "STRIPS": tiles.strips,
    }  # fmt: skip

    for k, count in enumerate(heights):
        first, end = k * height, k * height + count
        triton_call.launch(
            kernels.softplus_kernel, (strips[k] * col_tiles,),
            {**arguments, "p": tiles.output(panel[:count]), "first_row": first, "n": end, "rows": count,
             "strips": strips[k], "strip_tiles": strip_tiles[k], "first_part": sum(strips[:k]) * col_tiles},
            constants, **tiles.options,
        )  # fmt: skip
        _fold(part_rows, rows[first:end], col_tiles)
        if need_cols:
            _fold(part_cols, cols if end == n else part_cols[0], 1 + strips[k])
        if with_dx:
            multiply_into(dx_sums[:count], panel[:count, :m], y, accumulate=False)
            _scale(dx_sums, x[first:end], dx[first:end], along_x[first // BLOCK_R :], scale, exponent)
        if with_dy:
            multiply_into(dy_sums, panel[:count, :m].T, x[first:end], accumulate=k > 0)
    if with_dy:
        _scale(dy_sums, y, dy, along_y, scale, exponent)
    if not gradient:
        return rows, cols, dx, dy, torch.zeros_like(scale), torch.zeros_like(scale)
    dx, dy = (
        g[:, :width].contiguous() if need else g.new_empty(0) for g, need in ((dx, need_dx), (dy, with_dy))
    )  # fmt: skip
    return rows, cols, dx, dy, total(along_x if with_dx else along_y), total(totals)


def _tiles(x: Tensor) -> Tiles:
    """dot_lse's way to make tiles of scores, in tiles that leave registers for what is made of them."""
    tiles = Tiles.of("gradient", x)
    config = CONFIGS[target_name(x.device)] if x.element_size() == 2 else tiles.config
    sizes = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    return replace(tiles, config=config, constants={**tiles.constants, **sizes})


def _scale(sums: Tensor, own: Tensor, out: Tensor, along: Tensor, scale: Tensor, exponent: Tensor) -> None:
    """out = scale 2^-exponent sums, in its dtype, and along = parts of <own, out> / scale; there are no positives."""
    features_gradient(
        sums, own, own[:0], out, along, g_positives=scale, scale=scale, exponent=exponent, shift=0, g_shift=0
    )


def _fold(parts: Tensor, out: Tensor, count: int) -> None:
    """out (l,) = sum of the first `count` rows of parts (count or more, l), which out may be the first of."""
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    triton_call.launch(
        kernels.reduce, (blocks(out.numel(), BLOCK_L),),
        {"partials": parts, "out": out, "blocks": count, "width": out.numel()},
        {"BLOCK_R": BLOCK_T, "BLOCK_H": BLOCK_L},
    )  # fmt: skip


def _poison(x: Tensor, y: Tensor) -> Tensor:
    """(): 0, or NaN where a feature is not finite."""
    from cibr_kernels.primitives.dot.softplus import triton_kernels as kernels

    x_blocks, y_blocks = blocks(x.numel(), BLOCK_P), blocks(y.numel(), BLOCK_P)
    parts = torch.empty(x_blocks + y_blocks, dtype=torch.float32, device=x.device)
    triton_call.launch(
        kernels.poison_kernel, (x_blocks + y_blocks,),
        {"x": x, "y": y, "parts": parts, "x_count": x.numel(), "y_count": y.numel(), "x_blocks": x_blocks},
        {"BLOCK": BLOCK_P},
    )  # fmt: skip
    return total(parts)


def _exponent(row_weights: Tensor, col_weights: Tensor | None) -> Tensor:
    """(): the power of two of G's unit, triton_backward.exponent_kernel's."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    exponent = row_weights.new_empty((), dtype=torch.float32)
    cols = row_weights.new_empty(0) if col_weights is None else col_weights
    triton_call.launch(
        kernels.exponent_kernel, (1,),
        {"g_rows": row_weights.contiguous(), "g_cols": cols.contiguous(), "exponent": exponent,
         "n": row_weights.numel(), "m": cols.numel()},
        {"BLOCK": 4096}, num_warps=8,
    )  # fmt: skip
    return exponent


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
