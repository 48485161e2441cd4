"""dot_lse in C++: csrc/dot/lse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import DTYPES, call, scratch
from cibr_kernels.primitives.dot.problem import DotProblem, LseGradients, LseProblem, LseSums

_BLOCK = 32  # columns of a block of the stash: csrc/dot/engine.h, kBlock


def stash_shape(n: int, m: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Blocks of 32 columns, (m / 32, n, 32) in one dimension: compilers tell a size of 1 from others.

    bfloat16 for bfloat16 features only, elsewhere it would cost 1e-3 in the gradients.
    """
    return ((m + _BLOCK - 1) // _BLOCK * n * _BLOCK,), torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def problem_fields(problem: DotProblem) -> dict[str, Any]:
    """The fields of a parameter struct that say what is computed (csrc/dot/problem.h).

    Groups are numbered from 0, int32: the kernels compare a vector of them with one.
    """
    (n, m, d), row_groups, col_groups = problem.sizes, None, None
    if problem.row_ids is not None and problem.col_ids is not None:
        _, numbers = torch.unique(torch.cat((problem.row_ids, problem.col_ids)), return_inverse=True)
        row_groups, col_groups = numbers[:n].int(), numbers[n:].int()
    return {
        "x": problem.x,
        "y": problem.y,
        "dtype": DTYPES[problem.x.dtype],
        "n": n,
        "m": m,
        "d": d,
        "scale": problem.scale.item(),
        "row_ids": row_groups,
        "col_ids": col_groups,
        "first_positive": problem.first_positive,
    }


def forward(problem: LseProblem, need_cols: bool, need_max: bool, stash: Tensor) -> tuple[Tensor, ...]:
    """-> rows (n,), cols (m,) or (0,), positives (n,), the maxima of rows and cols (n,), (m,) or (0,), stash shift ().

    Fills the stash.
    """
    n, m, _ = problem.sizes
    m = m if need_cols else 0
    shapes = (n,), (m,), (n,), (n if need_max else 0,), (m if need_max else 0,), ()
    outputs = tuple(problem.scale.new_empty(s) for s in shapes)
    names = "row_lse", "col_lse", "positives", "row_max", "col_max", "stash_shift"
    _run("dot_lse_forward", "DotForward", problem, stash, **dict(zip(names, outputs, strict=True)))
    return outputs


def backward(
    problem: LseProblem, sums: LseSums, gradients: LseGradients, need_dx: bool, need_dy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx (n, d), dy (m, d), each empty unless needed, dscale ()."""
    made = gradient_fields(problem, problem.x.dtype, need_dx, need_dy)
    _run(
        "dot_lse_backward",
        "DotBackward",
        problem,
        sums.stash,
        row_lse=sums.rows,
        row_weight=gradients.rows,
        col_lse=sums.cols,
        col_weight=gradients.cols,
        positive_grad=gradients.positives,
        stash_shift=sums.stash_shift.item(),
        **made,
    )
    return made["dx"], made["dy"], made["dscale"]


def gradient_fields(problem: DotProblem, dtype: torch.dtype, need_dx: bool, need_dy: bool) -> dict[str, Tensor]:
    """The fields with room for dx (n, d), dy (m, d) of `dtype`, each empty unless needed, and zeros for dscale ()."""
    x, y = problem.x, problem.y
    return {
        "dx": scratch(x.shape if need_dx else (0,), dtype, x.device),
        "dy": scratch(y.shape if need_dy else (0,), dtype, y.device),
        "dscale": torch.zeros_like(problem.scale),
    }


def _run(kernel: str, struct: str, problem: LseProblem, stash: Tensor, **fields: Tensor | float) -> None:
    n, m, d = problem.sizes
    shared = {
        "mask_positives": problem.mask_positives,
        "row_limits": problem.row_limits,
        "stash": stash,
        "stash_dtype": DTYPES[stash.dtype],
    }
    call(kernel, struct, n * m * d, problem_fields(problem) | shared | fields)
