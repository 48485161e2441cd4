"""dot_softplus in C++: csrc/dot/softplus."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cibr_kernels.dispatch.native_call import call
from cibr_kernels.numerics import early_dtype
from cibr_kernels.primitives.dot.lse.native import gradient_fields, problem_fields
from cibr_kernels.primitives.dot.problem import SoftplusProblem


def forward(
    problem: SoftplusProblem, row_weights: Tensor | None, col_weights: Tensor | None, need_cols: bool, need_dx: bool,
    need_dy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> rows (n,), cols (m,) or (0,), dx (n, d), dy (m, d), each empty unless needed, dscale (), dbias ().

    Row weights are given where dx or dy is needed; both are float32 for float16.
    """
    made = early_dtype(problem.x.dtype)
    if need_dx or need_dy:
        problem = replace(problem, x=problem.x.to(made), y=problem.y.to(made))
    n, m, d = problem.sizes
    rows, cols = problem.scale.new_empty(n), problem.scale.new_empty(m if need_cols else 0)
    gradients = gradient_fields(problem, made, need_dx, need_dy)
    dbias = torch.zeros_like(problem.bias)
    fields = problem_fields(problem) | gradients
    fields |= {"bias": problem.bias.item(), "attract": problem.attract, "dbias": dbias}
    fields |= {"row_weight": row_weights, "col_weight": col_weights, "row_sum": rows, "col_sum": cols}
    call("dot_softplus", "DotSoftplus", n * m * d, fields)
    return rows, cols, gradients["dx"], gradients["dy"], gradients["dscale"], dbias
