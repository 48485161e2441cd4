"""additive_shifts in plain PyTorch: the specification, with the (k, n, h) tensor the kernels never build.

scores_ri = sum_h w_h phi(a_ih + b_jh)    j = (i + first + r) mod m,  r = 0 ... k - 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.primitives.additive.moments.reference import ACTIVATIONS


def partners(n: int, m: int, first: int, k: int, device: torch.device) -> Tensor:
    """(k, n) int64: the row of b beside row i of a at each shift."""
    rows, shifts = torch.arange(n, device=device), torch.arange(first, first + k, device=device)
    return (rows + shifts[:, None]) % m


def additive_shifts(
    a: Tensor, b: Tensor, w: Tensor, k: int, first: int = 1, activation: str = "relu", slope: float = 0.01
) -> Tensor:
    """a (n, h), b (m, h), w (h,) -> scores (k, n), differentiable in all three; float32 for half-precision inputs."""
    a, b, w = (t if t.dtype == torch.float64 else t.float() for t in (a, b, w))
    t = a + b[partners(a.shape[0], b.shape[0], first, k, a.device)]
    return (ACTIVATIONS[activation][0](t, slope) * w).sum(-1)


def unsupported(*tensors: Tensor) -> str | None:
    return None


def forward(a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float) -> Tensor:
    """-> scores (k, n)."""
    return additive_shifts(a, b, w, k, first, activation, slope)


def backward(
    grad: Tensor, a: Tensor, b: Tensor, w: Tensor, first: int, k: int, activation: str, slope: float,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad (k, n) -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    phi, phi_slope = ACTIVATIONS[activation]
    wide = [x if x.dtype == torch.float64 else x.float() for x in (a, b, w)]
    index = partners(a.shape[0], b.shape[0], first, k, a.device)
    t = wide[0] + wide[1][index]  # (k, n, h)
    per_pair = grad[..., None] * wide[2] * phi_slope(t, slope)
    da = per_pair.sum(0).to(a.dtype) if need_a else a.new_empty(0)
    db = b.new_empty(0)
    if need_b:
        db = torch.zeros_like(wide[1]).index_add(0, index.flatten(), per_pair.flatten(0, 1)).to(b.dtype)
    dw = (grad[..., None] * phi(t, slope)).sum((0, 1)).to(w.dtype) if need_w else w.new_empty(0)
    return da, db, dw
