"""dot_moments in plain PyTorch: the specification.

S_ij = <f_i, g_j>        J = mean_i S_i,first_positive+i        L = log mean_(i,j) in P exp S_ij
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.primitives.additive.moments.reference import moments


def dot_moments(f: Tensor, g: Tensor, first_positive: int = 0, include_diagonal: bool = False) -> tuple[Tensor, Tensor]:
    """f (n, k), g (m, k) -> J (), L (), differentiable in both."""
    f, g = (t if t.dtype == torch.float64 else t.float() for t in (f, g))
    return moments(f @ g.T, first_positive, include_diagonal)
