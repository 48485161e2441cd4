"""The O(n) ends of the plain clip_loss in Triton: of dot_lse's sums the loss, and of its gradient P's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.primitives.dot.lse.triton import Weights, weighted
from cibr_kernels.primitives.dot.lse.triton_configs import blocks
from cibr_kernels.primitives.dot.problem import LseProblem, LseSums
from cibr_kernels.primitives.dot.triton_parts import total

BLOCK = 128


def unsupported(*tensors: Tensor) -> str | None:
    """float16 needs a power of two found among the weights before they are made."""
    if tensors[0].dtype == torch.float16:
        return "the kernels of this loss's ends are for bfloat16 and float32"
    return triton_call.unsupported(*tensors)


def forward(sums: LseSums) -> Tensor:
    """-> the loss ()."""
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


def backward(
    g: Tensor, problem: LseProblem, sums: LseSums, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (n, d), each empty unless needed, dscale ()."""
    from cibr_kernels.losses.clip import triton_kernels as kernels

    n, m, new = sums.rows.numel(), sums.cols.numel(), sums.rows.new_empty
    weights = Weights(new(n), new(m), new(n), new(m), new(()), sums.stash_shift)
    g_positives = new(n)
    triton_call.launch(
        kernels.slopes_kernel, (blocks(n, BLOCK),),
        {"g": g, "rows": sums.rows, "cols": sums.cols, "positives": sums.positives, "u": weights.u, "v": weights.v,
         "rows2": weights.rows2, "cols2": weights.cols2, "g_positives": g_positives, "exponent": weights.exponent,
         "stash_shift": sums.stash_shift, "share": 1 / (n + m), "n": n},
        {"COLS": m > 0, "BLOCK": BLOCK},
    )  # fmt: skip
    return weighted(problem, weights, g_positives, sums.stash, need_dx, need_dy)
