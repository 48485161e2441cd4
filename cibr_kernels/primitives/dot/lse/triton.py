"""dot_lse in Triton: launches and workspace.

The kernels are in triton_{tile,forward,backward}.py, tile sizes in triton_configs.py.

Forward, 1 pass: panels of `forward_rows` rows; each tile of scores is summed where it was made, and a panel's sums of
tiles are folded into the totals.  Backward, 3 passes: panels of `backward_rows` rows and some of the columns; P of a
panel in the features' dtype, then two of the vendor's matmuls, dx += P y and dy += P^T x, with float32 sums.  With a
stash the scores are not made again: 2 passes.  The online mode's launches always happen, and return at once where the
mode is another.
Half-precision features of up to `owned_width` have a backward without P in memory: 2 passes for dx and 2 for dy.
Ids are read as they are, int64, by every kernel that makes scores; a stash holds 0 at the pairs that they mask.  The
maxima are found in the tiles, folded like sums, and cost no pass.  On sm_100 either takes the registers that strips of
tiles need, so that a program makes one tile.  A sum that looks like an underflow may be that of nothing: only then are
ids searched for a pair that takes part, n m comparisons where every sum is empty.

Workspace in bytes, with 128 x 128 tiles:
    forward     forward_rows / 128 * 12 m + O(n + m)            768 m by default (1280 m on sm_100, 64 columns online)
    backward    P + 4 rows of P * d + 4 m d + O(n + m), or 4 max(n, m) d + O(n + m)
    both        itemsize * (n + m) d where 32 does not divide d
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.primitives.dot.lse.triton_configs import OWNED, Tiles, blocks, target_name
from cibr_kernels.primitives.dot.problem import LseGradients, LseProblem, LseSums
from cibr_kernels.primitives.dot.triton_parts import (
    BLOCK_R,
    aligned,
    both_features_gradients,
    cols_of_panel,
    features_block,
    features_gradient,
    is_aligned,
    multiply_into,
    pitch,
    rows_of_panel,
    total,
)  # fmt: skip

BLOCK_L = 128  # elements of (n,) and (m,)
BLOCK_T = 32  # tiles that are folded, or ids that are looked at, at a time
BLOCK_F = 32  # rows or columns of a program that folds: few, so that the few thousand rows of a panel are many programs


@dataclass(frozen=True)
class Panels:
    """Rows at a time, multiples of 128; what they cost is above.

    Many: a step at N = 65536, D = 512 takes 30.5 ms with 8192 rows, 32.6 with 2048 (H200; the vendor's matmuls like
    large operands), and every launch takes time of the host.  Below a width of 128 or so writing P once and reading it
    twice takes longer than computing it twice.
    """

    forward_rows: int = 8192
    backward_rows: int = 8192
    backward_cols: int = 16384  # at most, without a stash
    backward_bytes: int = 128 << 20  # of P without a stash, or twice those of the features, whichever is more
    stash_bytes: int = 1 << 30  # of P made from a stash, unless LEAST_ROWS need more
    owned_width: int = 128  # at most 128: the rows' gradients are kept in registers


PANELS = Panels()


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """(n, m rounded up to 16): bfloat16 for bfloat16 features only, elsewhere it would cost 1e-3 in the gradients."""
    return (n, pitch(m)), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def room_for_stash(x: Tensor, y: Tensor, budget: int) -> Tensor:
    """Where `forward` keeps its exponentials; (0,) where they exceed the budget, in bytes."""
    shape, dtype = stash_shape(x.shape[0], y.shape[0], x.dtype)
    return torch.empty(shape if math.prod(shape) * dtype.itemsize <= budget else (0,), dtype=dtype, device=x.device)


def forward(
    problem: LseProblem, need_cols: bool, need_max: bool, stash: Tensor,
    end: Callable[[dict[str, Any], bool], None] | None = None, panels: Panels = PANELS,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), positives (n,), row and column maxima or (0,), stash shift (); fills the stash.

    The stash shift is that of the exponentials, stashed or not: NaN where there is none, in the online mode.
    end(arguments of the last fold, fold): is called at the end, and where fold launches that fold itself: it then
    finishes rows, cols, positives and the stash shift where the mode is not FIXED.
    """
    from cibr_kernels.primitives.dot.lse import triton_forward as kernels

    problem = _aligned_problem(problem)
    (n, m, d), x, y, scale = problem.sizes, problem.x, problem.y, problem.scale
    pairs, limits = _pairs(problem), _limits(problem)
    new = scale.new_empty
    rows, cols, positives, stash_shift = new(n), new(m if need_cols else 0), new(n), new(())
    mode, shift_log2 = _choose_mode(problem, positives)
    height = min(panels.forward_rows, n)
    tiles, online = Tiles.of("scores", x, strips=not (need_max or problem.chosen)), Tiles.of("online", x)
    strip = tiles.strip_tiles(height, m) * tiles.config.block_m  # rows of a program
    online_strip = 4 * online.config.block_m
    most_tiles = max(blocks(m, t.config.block_n) for t in (tiles, online))
    most_strips = max(blocks(height, s) for s in (strip, online_strip))
    # maxima and sums, from 64 bytes on: a start of another alignment would be a reason to compile again
    part_rows, part_cols = new((2, pitch(most_tiles * height))), new((2, pitch(most_strips * cols.numel())))
    sums = {"row_sum": part_rows[1], "col_sum": part_cols[1]}
    maxima = {"row_max": part_rows[0], "col_max": part_cols[0]}
    kept = maxima if need_max else dict.fromkeys(maxima)
    totals = {"row_max": new(n), "row_sum": rows, "col_max": new(cols.shape), "col_sum": cols}
    finish = {
        "mode": mode, "shift_log2": shift_log2, **pairs[0], **totals, "positives": positives,
        "stash_shift": stash_shift, "n": n, "m": m, "panel": height,
    }  # fmt: skip

    for wanted, t, strip_rows in ((kernels.FIXED, tiles, strip), (kernels.ONLINE, online, online_strip)):
        wanted, col_tiles = wanted.value, blocks(m, t.config.block_n)
        operands, constants = t.operands(x, y), {**pairs[1], **limits[1], "COLS": need_cols, **t.constants}
        for first in range(0, n, height):
            last = min(first + height, n)
            strips = blocks(last - first, strip_rows)
            arguments = {
                **operands, "scale": scale, "mode": mode, **pairs[0], **limits[0], **sums, "first_row": first,
                "n": last, "m": m, "d": d, "panel": height, "strips": strips,
                "strip_tiles": strip_rows // t.config.block_m,
            }  # fmt: skip
            if t is tiles:
                arguments |= {**kept, "shift_log2": shift_log2, "stash": t.output(stash[first:last]), "pitch": pitch(m)}
                choices = {"MAX": need_max, "STASH": stash.numel() > 0, "STRIPS": t.strips, **constants}
                triton_call.launch(
                    kernels.dot_lse_scores_kernel, (strips * col_tiles,), arguments, choices, **t.options
                )
            else:
                grid = (min(strips * col_tiles, t.few),)
                triton_call.launch(
                    kernels.dot_lse_online_scores_kernel, grid, arguments | maxima, constants, **t.options
                )
            folded = {
                **finish, **{f"part_{name}": part for name, part in (sums | maxima).items()}, "first_row": first,
                "rows": last - first, "strips": strips, "col_tiles": col_tiles,
                "row_blocks": blocks(last - first, BLOCK_F),
            }  # fmt: skip
            if end is not None and t is online and height == n:
                continue
            triton_call.launch(
                kernels.dot_lse_fold_kernel, (blocks(last - first, BLOCK_F) + blocks(cols.numel(), BLOCK_F),), folded,
                {"WANTED": wanted, **pairs[1], "MAX": need_max or t is online, "BLOCK_T": BLOCK_T, "BLOCK_L": BLOCK_F},
            )  # fmt: skip
    if end is not None:
        end(folded, height == n)
    found = (totals["row_max"], totals["col_max"]) if need_max else (new(0), new(0))
    return rows, cols, positives, *found, stash_shift


def backward(
    problem: LseProblem, sums: LseSums, gradients: LseGradients, need_dx: bool, need_dy: bool, panels: Panels = PANELS
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    weights = Weights.of(gradients, sums)
    return weighted(problem, weights, gradients.positives, sums.stash, need_dx, need_dy, panels=panels)


def weighted(
    problem: LseProblem, weights: Weights, g_positives: Tensor, stash: Tensor, need_dx: bool, need_dy: bool,
    g: Tensor | None = None, panels: Panels = PANELS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` from the weights that its gradients make, times g () in the end."""
    if not (is_aligned(problem.x) and is_aligned(problem.y)):
        wide = _aligned_problem(problem)
        dx, dy, dscale = weighted(wide, weights, g_positives, stash, need_dx, need_dy, g, panels)
        d = problem.x.shape[1]
        return dx[:, :d].contiguous() if need_dx else dx, dy[:, :d].contiguous() if need_dy else dy, dscale
    (n, m, d), x, y, scale = problem.sizes, problem.x, problem.y, problem.scale
    new, first_positive = scale.new_empty, problem.first_positive
    with_dx = need_dx or not need_dy  # dscale needs one of the two
    finish: dict[str, Any] = {"scale": scale, "exponent": weights.exponent, "g": g}
    finish_y = {**finish, "g_positives": g_positives, "shift": -first_positive, "g_shift": -first_positive}
    along_x, along_y = new(blocks(n, BLOCK_R) if with_dx else 0), new(blocks(m, BLOCK_R) if need_dy else 0)
    none, narrow = x.new_empty(0), x.element_size() == 2 and d <= panels.owned_width
    if stash.numel() == 0 and narrow and problem.row_limits is None:
        if with_dx:
            owned, dx = _owned_gradient(problem, weights), torch.empty_like(x)
            features_gradient(
                owned, x, y, dx, along_x, **finish, g_positives=g_positives, shift=first_positive, g_shift=0
            )
        if need_dy:
            owned, dy = _owned_gradient(problem.transposed, weights.transposed), torch.empty_like(y)
            features_gradient(owned, y, x, dy, along_y, **finish_y)
        return dx if need_dx else none, dy if need_dy else none, total(along_x if with_dx else along_y)

    height, width = _panel_shape(problem, stash, panels)
    together = height == n and with_dx and need_dy  # both ends in one launch
    dx = torch.empty_like(x) if with_dx and not together else none
    panel = x.new_empty(height * pitch(width))
    dx_sums, dy_sums = new((height, d) if with_dx else 0), new((m, d) if need_dy else 0)
    cuts = [(left, min(left + width, m)) for left in range(0, m, width)]
    makers = [_maker(problem.columns(*cut), weights.columns(*cut), stash) for cut in cuts]
    for first in range(0, n, height):
        end = min(first + height, n)
        for (left, right), make_panel in zip(cuts, makers, strict=True):
            here = panel[: height * pitch(right - left)].view(height, -1)
            make_panel(here, first, end)
            p = here[: end - first, : right - left]
            if with_dx:
                multiply_into(dx_sums[: end - first], p, y[left:right], accumulate=left > 0)
            if need_dy:
                multiply_into(dy_sums[left:right], p.T, x[first:end], accumulate=first > 0)
        if with_dx and not together:
            features_gradient(
                dx_sums, x[first:end], y, dx[first:end], along_x[first // BLOCK_R :], **finish,
                g_positives=g_positives[first:end], shift=first + first_positive, g_shift=0,
            )  # fmt: skip
    del panel, here, p  # what follows takes its memory
    if together:
        dx, dy = torch.empty_like(x), torch.empty_like(y)
        both_features_gradients(
            dx_sums, dy_sums, x, y, dx, dy, along_x, **finish, g_positives=g_positives, first_positive=first_positive
        )
        return dx if need_dx else none, dy, total(along_x)
    if need_dy:
        dy = torch.empty_like(y)
        features_gradient(dy_sums, y, x, dy, along_y, **finish_y)
    return dx if need_dx else none, dy if need_dy else none, total(along_x if with_dx else along_y)


def _panel_shape(problem: LseProblem, stash: Tensor, panels: Panels) -> tuple[int, int]:
    """Rows and columns of P at a time; a stash is read in whole rows."""
    (n, m, d), itemsize = problem.sizes, problem.x.element_size()
    if stash.numel():
        return rows_of_panel(panels.backward_rows, panels.stash_bytes, n, m, itemsize), m
    rows = min(n, panels.backward_rows)
    return rows, cols_of_panel(panels.backward_cols, panels.backward_bytes, rows, n, m, d, itemsize)


def _aligned_problem(problem: LseProblem) -> LseProblem:
    """The same with features as `aligned`, ids contiguous."""
    ids = (None if t is None else t.contiguous() for t in (problem.row_ids, problem.col_ids))
    row_ids, col_ids = ids
    return replace(problem, x=aligned(problem.x), y=aligned(problem.y), row_ids=row_ids, col_ids=col_ids)


def _pairs(problem: LseProblem) -> tuple[dict[str, Any], dict[str, bool]]:
    """Which pairs take part in the sums: a kernel's arguments, and its constants."""
    ids = {"row_ids": problem.row_ids, "col_ids": problem.col_ids, "first_positive": problem.first_positive}
    return ids, {"MASK": problem.mask_positives, "IDS": problem.grouped}


def _limits(problem: LseProblem) -> tuple[dict[str, Any], dict[str, bool]]:
    """Which scores take part: the same, for the kernels that make them."""
    return {"row_limits": problem.row_limits}, {"LIMITS": problem.row_limits is not None}


def _choose_mode(problem: LseProblem, positives: Tensor) -> tuple[Tensor, Tensor]:
    """-> mode () int32, shift_log2 () float32; writes positives (n,)."""
    from cibr_kernels.primitives.dot.lse import triton_forward as kernels

    (n, m, d), x, y, scale = problem.sizes, problem.x, problem.y, problem.scale
    x_blocks, y_blocks = blocks(n, BLOCK_R), blocks(m, BLOCK_R)
    largest, shift_log2 = scale.new_empty(x_blocks + y_blocks), scale.new_empty(())
    mode = torch.empty((), dtype=torch.int32, device=x.device)
    triton_call.launch(
        kernels.dot_lse_statistics_kernel, (x_blocks + y_blocks,),
        {"x": x, "y": y, "scale": scale, "positives": positives, "largest": largest, "n": n, "m": m,
         "d": d, "first_positive": problem.first_positive, "x_blocks": x_blocks},
        {"BLOCK_R": BLOCK_R, "BLOCK_D": features_block(x)},
    )  # fmt: skip
    triton_call.launch(
        kernels.dot_lse_choose_kernel, (1,),
        {"largest": largest, "scale": scale, "mode": mode, "shift_log2": shift_log2, "x_blocks": x_blocks,
         "blocks": x_blocks + y_blocks},
        {"BLOCK": 1024},
    )  # fmt: skip
    return mode, shift_log2


@dataclass(frozen=True)
class Weights:
    """What P is made of besides the scores: triton_backward.dot_lse_weights_kernel."""

    u: Tensor  # (n,)
    v: Tensor  # (m,) or (0,)
    rows2: Tensor  # (n,)
    cols2: Tensor  # (m,) or (0,)
    exponent: Tensor  # ()
    stash_shift: Tensor  # ()

    def columns(self, left: int, right: int) -> Weights:
        """Those of some columns."""
        v, cols2 = self.v[left:right], self.cols2[left:right]
        return Weights(self.u, v, self.rows2, cols2, self.exponent, self.stash_shift)

    @staticmethod
    def of(g: LseGradients, sums: LseSums) -> Weights:
        from cibr_kernels.primitives.dot.lse import triton_backward as kernels

        n, m, new = sums.rows.numel(), sums.cols.numel(), sums.rows.new_empty
        w = Weights(new(n), new(m), new(n), new(m), new(()), sums.stash_shift)
        gradients = {"g_rows": g.rows, "g_cols": g.cols, "exponent": w.exponent, "n": n, "m": m}
        triton_call.launch(kernels.dot_exponent_kernel, (1,), gradients, {"BLOCK": 4096}, num_warps=8)
        triton_call.launch(
            kernels.dot_lse_weights_kernel, (blocks(n, BLOCK_L) + blocks(m, BLOCK_L),),
            {**gradients, "rows": sums.rows, "cols": sums.cols, "u": w.u, "v": w.v, "rows2": w.rows2, "cols2": w.cols2,
             "stash_shift": sums.stash_shift, "row_blocks": blocks(n, BLOCK_L)},
            {"BLOCK_L": BLOCK_L},
        )  # fmt: skip
        return w

    @property
    def transposed(self) -> Weights:
        return replace(self, u=self.v, v=self.u, rows2=self.cols2, cols2=self.rows2)


def _maker(problem: LseProblem, w: Weights, stash: Tensor) -> Any:
    """-> f(panel, first, end), which writes P of rows [first, end) to panel (at least end - first, pitch)."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    (_, m, d), x, y = problem.sizes, problem.x, problem.y
    row_pitch, (ids, choices), (limits, limited) = pitch(m), _pairs(problem), _limits(problem)
    tiles, online = Tiles.of("gradient", x, strips=not problem.chosen), Tiles.of("online", x)
    constants: dict[str, Any] = {**choices, **limited, "COLS": w.v.numel() > 0}
    weights = {"stash_shift": w.stash_shift, "u": w.u, "v": w.v, "m": m, "pitch": row_pitch}
    scores = {**weights, "scale": problem.scale, "d": d, **ids, **limits}

    def make(panel: Tensor, first: int, end: int) -> None:
        """From the stash or from the features; online where the mode is that."""
        place = {"first_row": first, "n": end}
        out = panel[: end - first]
        if stash.numel():
            triton_call.launch(
                kernels.dot_lse_unstash_kernel, (blocks(end - first, 32), blocks(row_pitch, 256)),
                {**weights, **place, "e": stash[first:end], "p": out},
                {"COLS": constants["COLS"], "BLOCK_M": 32, "BLOCK_N": 256}, num_warps=8,
            )  # fmt: skip
        else:
            strip_tiles = tiles.strip_tiles(end - first, m)
            strips = blocks(end - first, strip_tiles * tiles.config.block_m)
            triton_call.launch(
                kernels.dot_lse_gradient_kernel, (strips * blocks(m, tiles.config.block_n),),
                {**scores, **place, **tiles.operands(x, y), "p": tiles.output(out), "strips": strips,
                 "strip_tiles": strip_tiles},
                {**constants, **tiles.constants, "STRIPS": tiles.strips}, **tiles.options,
            )  # fmt: skip
        triton_call.launch(
            kernels.dot_lse_online_gradient_kernel, (min(online.count(end - first, m), online.few),),
            {**scores, **place, **online.operands(x, y), "p": online.output(out), "rows2": w.rows2, "cols2": w.cols2},
            {**constants, **online.constants}, **online.options,
        )  # fmt: skip

    return make


def _owned_gradient(problem: LseProblem, w: Weights) -> Tensor:
    """-> P y (n, d) float32."""
    from cibr_kernels.primitives.dot.lse import triton_backward as kernels

    config, (n, m, d), x = OWNED[target_name(problem.x.device)], problem.sizes, problem.x
    sums, (_, choices) = problem.scale.new_empty(x.shape), _pairs(problem)
    triton_call.launch(
        kernels.dot_lse_owned_gradient_kernel, (blocks(n, config.block_m),),
        {"own": x, "partner": problem.y, "scale": problem.scale, "stash_shift": w.stash_shift,
         "own_ids": problem.row_ids, "partner_ids": problem.col_ids, "a": w.u, "b": w.v,
         "a2": w.rows2, "b2": w.cols2, "sums": sums, "rows": n, "partners": m, "d": d,
         "first_positive": problem.first_positive},
        {**choices, "OWN_WEIGHT": w.u.numel() > 0, "PARTNER_WEIGHT": w.v.numel() > 0, "BLOCK_M": config.block_m,
         "BLOCK_N": config.block_n, "BLOCK_D": max(16, 1 << (d - 1).bit_length())},
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sums
