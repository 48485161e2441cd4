"""additive_shifts in plain PyTorch: the specification, with the (k, n, h) tensor the kernels never build.

scores_ri = sum_h w_h phi(a_ih + b_jh)    j = (i + first + r) mod m,  r = 0 ... k - 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.numerics import promote
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import Needs, ShiftsProblem


def partners(n: int, m: int, first: int, k: int, device: torch.device) -> Tensor:
    """(k, n) int64: the row of b beside row i of a at each shift."""
    rows, shifts = torch.arange(n, device=device), torch.arange(first, first + k, device=device)
    return (rows + shifts[:, None]) % m


def additive_shifts(
    a: Tensor, b: Tensor, w: Tensor, k: int, first: int = 1, activation: str = "relu", slope: float = 0.01
) -> Tensor:
    """a (n, h), b (m, h), w (h,) -> scores (k, n), differentiable in all three; float32 for half-precision inputs."""
    a, b, w = map(promote, (a, b, w))
    t = a + b[partners(a.shape[0], b.shape[0], first, k, a.device)]
    return (ACTIVATIONS[activation][0](t, slope) * w).sum(-1)


def forward(problem: ShiftsProblem) -> Tensor:
    """-> scores (k, n)."""
    return additive_shifts(*problem.tensors, problem.k, problem.first, problem.activation, problem.slope)


def backward(grad: Tensor, problem: ShiftsProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (k, n) -> da (n, h), db (m, h), dw (h,) as their inputs, each empty unless needed."""
    need_a, need_b, need_w = needs
    (n, m, _), (a, b, w) = problem.sizes, map(promote, problem.tensors)
    index = partners(n, m, problem.first, problem.k, a.device)
    t = a + b[index]  # (k, n, h)
    per_pair = grad[..., None] * w * problem.phi.derivative(t, problem.slope)
    da, db, dw = problem.gradients(needs)
    if need_a:
        da.copy_(per_pair.sum(0))
    if need_b:
        db.copy_(torch.zeros_like(b).index_add(0, index.flatten(), per_pair.flatten(0, 1)))
    if need_w:
        dw.copy_((grad[..., None] * problem.phi.value(t, problem.slope)).sum((0, 1)))
    return da, db, dw
