"""additive_scores in plain PyTorch, which builds (n, m, h): the specification.  float64 in is the oracle.

S_ij = sum_h w_h phi(a_ih + b_jh)
"""

from __future__ import annotations

from torch import Tensor

from cibr_kernels.numerics import promote
from cibr_kernels.primitives.additive.activations import ACTIVATIONS
from cibr_kernels.primitives.additive.problem import AdditiveProblem, Needs


def additive_scores(a: Tensor, b: Tensor, w: Tensor, activation: str = "relu", slope: float = 0.01) -> Tensor:
    """a (n, h), b (m, h), w (h,) -> S (n, m), differentiable in all three."""
    a, b, w = map(promote, (a, b, w))
    return ACTIVATIONS[activation][0](a[:, None] + b[None], slope) @ w


def forward(problem: AdditiveProblem) -> Tensor:
    """-> S (n, m)."""
    return additive_scores(*problem.tensors, problem.activation, problem.slope)


def backward(grad: Tensor, problem: AdditiveProblem, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """grad (n, m) -> da (n, h), db (m, h), dw (h,), each empty unless needed."""
    need_a, need_b, need_w = needs
    t = problem.a.to(grad.dtype)[:, None] + problem.b.to(grad.dtype)[None]  # (n, m, h)
    weighted = grad[:, :, None] * problem.phi.derivative(t, problem.slope)
    da, db, dw = problem.gradients(needs)
    if need_a:
        da.copy_(weighted.sum(1) * problem.w)
    if need_b:
        db.copy_(weighted.sum(0) * problem.w)
    if need_w:
        dw.copy_((grad[:, :, None] * problem.phi.value(t, problem.slope)).sum((0, 1)))
    return da, db, dw
