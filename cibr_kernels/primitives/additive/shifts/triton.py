"""additive_shifts in Triton: one launch forward; backward one for da (with dw's partial sums), one for db, one for dw.

More than 65535 shifts take several launches forward.  Workspace: (blocks of rows of a, h) float32 for dw.  Memory
traffic is k reads of a and b each way, from the cache where neighbouring shifts meet.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.numerics import ceil_div
from cibr_kernels.primitives.additive.problem import Needs, ShiftsProblem

TILE = {"BLOCK_R": 16, "BLOCK_H": 128}  # no spills on sm_80/90/100/120, gfx942, gfx1100
MOST_SHIFTS = 65535  # of a launch: a grid's second dimension


def forward(problem: ShiftsProblem) -> Tensor:
    """-> scores (k, n), float32."""
    (n, m, h), (a, b, w), k = problem.sizes, problem.tensors, problem.k
    out = torch.empty((k, n), dtype=torch.float32, device=a.device)
    for done in range(0, k, MOST_SHIFTS):
        here = out[done : done + MOST_SHIFTS]
        triton_call.launch(
            _kernels().additive_shifts_scores_kernel,
            (ceil_div(n, TILE["BLOCK_R"]), here.shape[0]),
            {
                "a": a,
                "b": b,
                "w": w,
                "out": here,
                "n": n,
                "m": m,
                "width": h,
                "first": problem.first + done,
                "slope": problem.slope,
            },
            {"ACTIVATION": problem.activation, **TILE},
        )
    return out


def backward(grad: Tensor, problem: ShiftsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (k, n) float32 -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    (n, m, h), (a, b, w), (need_a, need_b, need_w) = problem.sizes, problem.tensors, needs
    da, db, dw = problem.gradients(needs)
    blocks, blocks_h = ceil_div(n, TILE["BLOCK_R"]), ceil_div(h, TILE["BLOCK_H"])
    partials = torch.empty((blocks, h) if need_w else 0, dtype=torch.float32, device=a.device)
    shared = {
        "w": w,
        "grad": grad,
        "partials": partials,
        "n": n,
        "m": m,
        "width": h,
        "first": problem.first,
        "shifts": problem.k,
        "slope": problem.slope,
    }
    constants = {"ACTIVATION": problem.activation, **TILE}
    if need_a or need_w:
        triton_call.launch(
            _kernels().additive_shifts_gradient_kernel,
            (blocks, blocks_h),
            {"x": a, "y": b, "dx": da, "rows": n, "others": m, **shared},
            {"OF_B": False, "WEIGHTS": need_w, "STORE": need_a, **constants},
        )
    if need_b:
        triton_call.launch(
            _kernels().additive_shifts_gradient_kernel,
            (ceil_div(m, TILE["BLOCK_R"]), blocks_h),
            {"x": b, "y": a, "dx": db, "rows": m, "others": n, **shared},
            {"OF_B": True, "WEIGHTS": False, "STORE": True, **constants},
        )
    if need_w:
        triton_call.launch(
            _kernels().sums_reduce_kernel,
            (blocks_h,),
            {"partials": partials, "out": dw, "blocks": blocks, "width": h},
            TILE,
        )
    return da, db, dw


def _kernels() -> ModuleType:
    from cibr_kernels.primitives.additive.shifts import triton_kernels

    return triton_kernels
