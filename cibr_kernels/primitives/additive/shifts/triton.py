"""additive_shifts in Triton: one launch forward; backward one for da (with dw's partial sums), one for db, one for dw.

More than 65535 shifts take several launches forward.  Workspace: (blocks of rows of a, h) float32 for dw.  Memory
traffic is k reads of a and b each way, from the cache where neighbouring shifts meet.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from cibr_kernels.dispatch import triton_call
from cibr_kernels.dispatch.triton_call import unsupported as unsupported

TILE = {"BLOCK_R": 16, "BLOCK_H": 128}  # no spills on sm_80/90/100/120, gfx942, gfx1100
MOST_SHIFTS = 65535  # of a launch: a grid's second dimension


def forward(a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float) -> Tensor:
    """-> scores (k, n), float32."""
    (n, h), m = a.shape, b.shape[0]
    out = torch.empty((k, n), dtype=torch.float32, device=a.device)
    for done in range(0, k, MOST_SHIFTS):
        here = out[done : done + MOST_SHIFTS]
        triton_call.launch(
            _kernels().scores, (_cdiv(n, TILE["BLOCK_R"]), here.shape[0]),
            {"a": a, "b": b, "w": w, "out": here, "n": n, "m": m, "width": h, "first": first + done, "slope": slope},
            {"ACTIVATION": activation, **TILE},
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (k, n) float32 -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    (n, h), m = a.shape, b.shape[0]
    da, db, dw = (
        torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b), (w, need_w))
    )
    blocks, blocks_h = _cdiv(n, TILE["BLOCK_R"]), _cdiv(h, TILE["BLOCK_H"])
    partials = torch.empty((blocks, h) if need_w else 0, dtype=torch.float32, device=a.device)
    shared = {
        "w": w, "grad": grad, "partials": partials, "n": n, "m": m, "width": h, "first": first, "shifts": k,
        "slope": slope,
    }  # fmt: skip
    constants = {"ACTIVATION": activation, **TILE}
    if need_a or need_w:
        triton_call.launch(
            _kernels().gradient, (blocks, blocks_h),
            {"x": a, "y": b, "dx": da, "rows": n, "others": m, **shared},
            {"OF_B": False, "WEIGHTS": need_w, "STORE": need_a, **constants},
        )  # fmt: skip
    if need_b:
        triton_call.launch(
            _kernels().gradient, (_cdiv(m, TILE["BLOCK_R"]), blocks_h),
            {"x": b, "y": a, "dx": db, "rows": m, "others": n, **shared},
            {"OF_B": True, "WEIGHTS": False, "STORE": True, **constants},
        )  # fmt: skip
    if need_w:
        triton_call.launch(
            _kernels().reduce, (blocks_h,), {"partials": partials, "out": dw, "blocks": blocks, "width": h}, TILE
        )
    return da, db, dw


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _kernels() -> ModuleType:
    from cibr_kernels.primitives.additive.shifts import triton_kernels

    return triton_kernels
