"""dot_moments in C++: csrc/dot_moments."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.backends import native_unsupported as unsupported  # noqa: F401
from cibr_kernels.ops.native_call import DTYPES, call


def _problem(f: Tensor, g: Tensor, offset: int, include_diagonal: bool) -> dict:
    return {
        "x": f, "y": g, "dtype": DTYPES[f.dtype], "n": f.shape[0], "m": g.shape[0], "d": f.shape[1], "scale": 1.0,
        "offset": offset, "mask_positives": not include_diagonal,
    }  # fmt: skip


def forward(f: Tensor, g: Tensor, offset: int, include_diagonal: bool) -> tuple[Tensor, Tensor]:
    """-> J (), L ()."""
    moments = torch.empty(2, dtype=torch.float32)
    call("dot_moments_forward", "DotMomentsForward", **_problem(f, g, offset, include_diagonal), moments=moments)
    return moments[0].clone(), moments[1].clone()


def backward(
    grad_j: Tensor, grad_l: Tensor, f: Tensor, g: Tensor, el: Tensor, offset: int, include_diagonal: bool,
    need_f: bool, need_g: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> df (n, k), dg (m, k), each empty unless needed."""
    df = torch.empty_like(f) if need_f else f.new_empty(0)
    dg = torch.empty_like(g) if need_g else g.new_empty(0)
    call(
        "dot_moments_backward", "DotMomentsBackward", **_problem(f, g, offset, include_diagonal),
        grad_j=grad_j.contiguous(), grad_l=grad_l.contiguous(), el=el, dx=df, dy=dg,
    )  # fmt: skip
    return df, dg
