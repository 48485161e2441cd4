"""additive_scores in plain PyTorch, which builds (n, m, h): the specification.  float64 in is the oracle.

S_ij = sum_h w_h phi(a_ih + b_jh)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS


def additive_scores(a: Tensor, b: Tensor, w: Tensor, activation: str = "relu", slope: float = 0.01) -> Tensor:
    """a (n, h), b (m, h), w (h,) -> S (n, m), differentiable in all three."""
    a, b, w = (t if t.dtype == torch.float64 else t.float() for t in (a, b, w))
    return ACTIVATIONS[activation][0](a[:, None] + b[None], slope) @ w


def unsupported(*tensors: Tensor) -> str | None:
    return None


def forward(a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float) -> Tensor:
    """-> S (n, m)."""
    return additive_scores(a, b, w, activation, slope)


def backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, need_a: bool, need_b: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (n, m) -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    phi, phi_slope = ACTIVATIONS[activation]
    t = a.to(grad.dtype)[:, None] + b.to(grad.dtype)[None]  # (n, m, h)
    weighted = grad[:, :, None] * phi_slope(t, slope)
    da = (weighted.sum(1) * w).to(a.dtype) if need_a else a.new_empty(0)
    db = (weighted.sum(0) * w).to(b.dtype) if need_b else b.new_empty(0)
    dw = (grad[:, :, None] * phi(t, slope)).sum((0, 1)).to(w.dtype) if need_w else w.new_empty(0)
    return da, db, dw
