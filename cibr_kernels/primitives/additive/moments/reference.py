"""additive_moments in plain PyTorch: the specification, with the (n, m, h) tensor the kernels never build.

S_ij = sum_h w_h phi(a_ih + b_jh)
J = mean_i S_i,first_positive+i         L = log mean_(i,j) in P exp S_ij         P: all pairs, or all but the positives
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cibr_kernels.numerics import promote
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.moments.positives import backward as backward
from cibr_kernels.primitives.additive.problem import MomentsProblem, Needs


def pair_mask(n: int, m: int, first_positive: int, include_diagonal: bool, device: torch.device) -> Tensor:
    """(n, m) bool: the pairs whose exponentials are averaged."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device)
    if not include_diagonal:
        mask.diagonal(first_positive)[:n].fill_(False)
    return mask


def moments(scores: Tensor, first_positive: int, include_diagonal: bool) -> tuple[Tensor, Tensor]:
    """(n, m) scores -> J (), L ().  Shared by every critic's reference."""
    n, m = scores.shape
    mask = pair_mask(n, m, first_positive, include_diagonal, scores.device)
    lse = scores.masked_fill(~mask, float("-inf")).flatten().logsumexp(0)
    return scores.diagonal(first_positive)[:n].mean(), lse - math.log(n * m - (0 if include_diagonal else n))


def additive_moments(
    a: Tensor,
    b: Tensor,
    w: Tensor,
    activation: str = "relu",
    slope: float = 0.01,
    first_positive: int = 0,
    include_diagonal: bool = False,
) -> tuple[Tensor, Tensor]:
    """a (n, h), b (m, h), w (h,) -> J (), L (), differentiable in all three; float32 for half-precision inputs."""
    phi = ACTIVATIONS[activation][0]
    a, b, w = map(promote, (a, b, w))
    return moments(phi(a[:, None] + b[None], slope) @ w, first_positive, include_diagonal)


def forward(problem: MomentsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> J (), L () and the gradients of L: (n, h), (m, h), (h,), each empty unless needed."""
    if problem.grouped:
        js, els, *gradients = zip(*(forward(member, needs) for member in problem.members()), strict=True)
        da, db, dw = (torch.stack(g) if need else g[0] for g, need in zip(gradients, needs, strict=True))
        return torch.stack(js), torch.stack(els), da, db, dw
    need_a, need_b, need_w = needs
    a, b, w = map(promote, problem.tensors)
    t = a[:, None] + b[None]  # (n, m, h)
    phi, slope = problem.phi.value(t, problem.slope), problem.phi.derivative(t, problem.slope)
    scores = phi @ w
    j, el = moments(scores, problem.first_positive, problem.include_diagonal)
    n, m, _ = problem.sizes
    mask = pair_mask(n, m, problem.first_positive, problem.include_diagonal, a.device)
    p = torch.softmax(scores.masked_fill(~mask, float("-inf")).flatten(), 0).view_as(scores)
    da, db, dw = problem.gradients(needs)
    if need_a:
        da.copy_((p[..., None] * slope).sum(1) * w)
    if need_b:
        db.copy_((p[..., None] * slope).sum(0) * w)
    if need_w:
        dw.copy_(torch.einsum("ij,ijh->h", p, phi))
    if problem.bias is not None:
        j, el = j + problem.bias, el + problem.bias
    looked = _one_or_nan(a, b, w)
    return j * looked, el * looked, da * looked, db * looked, dw * looked


def _one_or_nan(*tensors: Tensor) -> Tensor:
    """(): 1, or NaN where a number is not finite, which e^-inf = 0 would hide; as the kernels say it."""
    finite = torch.stack([t.detach().isfinite().all() for t in tensors]).all()
    return torch.where(finite, 1.0, math.nan).to(tensors[0].dtype)
