"""The backward of additive_moments in plain PyTorch: gradients of L, which the forward made, and the positives of J.

t_i = a_i + b_first_positive+i
da_i = g_l dL/da_i + (g_j / n) w phi'(t_i)    db_first_positive+i the same    dw = g_l dL/dw + (g_j / n) sum_i phi(t_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import sum_dtype
from cibr_kernels.primitives.additive.problem import MomentsProblem, Needs

OfL = tuple[Tensor, Tensor, Tensor]  # the gradients of L in a, b and w, each empty unless it is needed


def backward(
    g_j: Tensor | None, g_l: Tensor | None, problem: MomentsProblem, of_l: OfL, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """g_j, g_l () or (groups,), None for 0 -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    (n, _, _), (a, b, w), (need_a, need_b, need_w) = problem.sizes, problem.tensors, needs
    sums = sum_dtype(a)
    zero = torch.zeros(problem.grouped, dtype=sums, device=a.device) if g_j is None or g_l is None else None
    g_j, g_l = (zero if g is None else g for g in (g_j, g_l))
    assert g_j is not None and g_l is not None
    of_pairs, of_units = (g_l, g_l) if g_l.dim() == 0 else (g_l[:, None, None], g_l[:, None])  # for each group
    t = a.to(sums) + b.narrow(-2, problem.first_positive, n)  # (n, h), the positives
    per_row = g_j / n if g_j.dim() == 0 else g_j[:, None] / n
    da_of_l, db_of_l, dw_of_l = of_l
    da, db, dw = a.new_empty(0), b.new_empty(0), w.new_empty(0)
    positive = t
    if need_a or need_b:
        positive = problem.phi.derivative(t, problem.slope) * (w * per_row).unsqueeze(-2)
    if need_a:
        da = (da_of_l * of_pairs + positive).to(a.dtype)
    if need_b:
        db = db_of_l * of_pairs
        db.narrow(-2, problem.first_positive, n).add_(positive)
        db = db.to(b.dtype)
    if need_w:
        dw = (dw_of_l * of_units + problem.phi.value(t, problem.slope).sum(-2) * per_row).to(w.dtype)
    return da, db, dw
