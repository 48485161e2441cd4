"""The plain clip_loss in Triton: dot_lse's launches, and the O(n) ends in one launch each."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import plans, triton_call
from cibr_kernels.primitives.dot.lse import triton as dot_lse
from cibr_kernels.primitives.dot.lse.triton_configs import blocks, tf32_allowed
from cibr_kernels.primitives.dot.problem import LseProblem, LseSums
from cibr_kernels.primitives.dot.triton_parts import total

BLOCK = 128


def unsupported(*tensors: Tensor) -> str | None:
    """float16 needs a power of two found among the weights before they are made."""
    if tensors[0].dtype == torch.float16:
        return "the kernels of this loss's ends are for bfloat16 and float32"
    return triton_call.unsupported(*tensors)


def forward(x: Tensor, y: Tensor, scale: Tensor, one_way: bool, budget: int) -> tuple[Tensor, ...]:
    """-> the loss (), and what `backward` reads: the fields of LseSums."""

    def direction(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        stash = dot_lse.room_for_stash(x, y, budget)
        problem = LseProblem(x, y, scale, None, None, 0, True)
        rows, cols, positives, _, _, shift = dot_lse.forward(problem, not one_way, False, stash)
        sums = LseSums(rows, cols, positives, shift, stash)
        return _loss(sums), *sums

    return plans.run(_key("clip_loss forward", x, one_way, budget), direction, (x, y, scale))


def backward(
    g: Tensor, x: Tensor, y: Tensor, scale: Tensor, kept: tuple[Tensor, ...], need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (n, d), each empty unless needed, dscale ()."""

    def direction(g: Tensor, x: Tensor, y: Tensor, scale: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        return _gradients(g, LseProblem(x, y, scale, None, None, 0, True), LseSums(*kept), need_dx, need_dy)

    dx, dy, dscale = plans.run(_key("clip_loss backward", x, need_dx, need_dy), direction, (g, x, y, scale, *kept))
    return dx, dy, dscale


def _key(name: str, x: Tensor, *options: int) -> tuple[object, ...]:
    return name, *options, dot_lse.panels, x.dtype == torch.float32 and tf32_allowed()


def _loss(sums: LseSums) -> Tensor:
    from cibr_kernels.losses.clip import triton_kernels as kernels

    n, cols = sums.rows.numel(), sums.cols.numel() > 0
    losses = sums.rows.new_empty(blocks(n, BLOCK))
    triton_call.launch(
        kernels.losses_kernel, (len(losses),),
        {"rows": sums.rows, "cols": sums.cols, "positives": sums.positives, "losses": losses,
         "share": 1 / (n * (1 + cols)), "n": n},
        {"COLS": cols, "BLOCK": BLOCK},
    )  # fmt: skip
    return total(losses)


def _gradients(
    g: Tensor, problem: LseProblem, sums: LseSums, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from cibr_kernels.losses.clip import triton_kernels as kernels

    n, m, new = sums.rows.numel(), sums.cols.numel(), sums.rows.new_empty
    weights = dot_lse.Weights(new(n), new(m), new(n), new(m), new(()), sums.stash_shift)
    g_positives = new(n)
    triton_call.launch(
        kernels.slopes_kernel, (blocks(n, BLOCK),),
        {"g": g, "rows": sums.rows, "cols": sums.cols, "positives": sums.positives, "u": weights.u, "v": weights.v,
         "rows2": weights.rows2, "cols2": weights.cols2, "g_positives": g_positives, "exponent": weights.exponent,
         "stash_shift": sums.stash_shift, "share": 1 / (n + m), "n": n},
        {"COLS": m > 0, "BLOCK": BLOCK},
    )  # fmt: skip
    return dot_lse.weighted(problem, weights, g_positives, sums.stash, need_dx, need_dy)
