"""dot_moments in plain PyTorch: the specification.

S_ij = <f_i, g_j>        J = mean_i S_i,offset+i        L = log mean_(i,j) in P exp S_ij
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.ops.additive_moments.reference import moments, pair_mask


def _promote(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def dot_moments(f: Tensor, g: Tensor, offset: int = 0, include_diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """f (n, k), g (m, k) -> J (), L (), differentiable in both."""
    return moments(_promote(f) @ _promote(g).T, offset, include_diagonal)


def unsupported(*tensors: Tensor) -> str | None:
    return None


def forward(f: Tensor, g: Tensor, offset: int, include_diagonal: bool) -> tuple[Tensor, Tensor]:
    """-> J (), L ()."""
    return dot_moments(f, g, offset, include_diagonal)


def backward(
    grad_j: Tensor, grad_l: Tensor, f: Tensor, g: Tensor, el: Tensor, offset: int, include_diagonal: bool,
    need_f: bool, need_g: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> df (n, k), dg (m, k), each empty unless needed."""
    n, m = f.shape[0], g.shape[0]
    scores = _promote(f) @ _promote(g).T
    mask = pair_mask(n, m, offset, include_diagonal, f.device)
    grad = (scores - el).exp() * (grad_l / mask.sum()) * mask
    grad.diagonal(offset)[:n] += grad_j / n
    df = (grad @ _promote(g)).to(f.dtype) if need_f else f.new_empty(0)
    dg = (grad.T @ _promote(f)).to(g.dtype) if need_g else g.new_empty(0)
    return df, dg
