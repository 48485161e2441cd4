"""additive_moments in plain PyTorch: the specification, with the (n, m, h) tensor the kernels never build.

S_ij = sum_h w_h phi(a_ih + b_jh)
J = mean_i S_i,first_positive+i         L = log mean_(i,j) in P exp S_ij         P: all pairs, or all but the positives
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SQRT_HALF, INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
GELU_C = math.sqrt(2 / math.pi)


def _gelu_tanh_slope(t: Tensor) -> Tensor:
    u = torch.tanh(GELU_C * (t + 0.044715 * t**3))
    return (1 + u) / 2 + t * (1 - u * u) / 2 * GELU_C * (1 + 3 * 0.044715 * t * t)


# name: (phi(t, slope), phi'(t, slope)); the order is `enum Activation` of csrc/additive/activation_names.h
ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]] = {
    "relu": (lambda t, s: t.relu(), lambda t, s: (t > 0).to(t.dtype)),
    "leaky_relu": (lambda t, s: F.leaky_relu(t, s), lambda t, s: torch.where(t > 0, 1.0, s).to(t.dtype)),
    "gelu": (
        lambda t, s: F.gelu(t),
        lambda t, s: torch.special.ndtr(t) + t * torch.exp(-t * t / 2) * INV_SQRT_2PI,
    ),
    "gelu_tanh": (lambda t, s: F.gelu(t, approximate="tanh"), lambda t, s: _gelu_tanh_slope(t)),
    "silu": (lambda t, s: F.silu(t), lambda t, s: torch.sigmoid(t) * (1 + t * torch.sigmoid(-t))),
    "elu": (lambda t, s: F.elu(t, s), lambda t, s: torch.where(t > 0, 1.0, s * t.clamp(max=0).exp()).to(t.dtype)),
    "softplus": (lambda t, s: F.softplus(t), lambda t, s: torch.sigmoid(t)),
    "tanh": (lambda t, s: torch.tanh(t), lambda t, s: 1 - torch.tanh(t) ** 2),
}


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
    a: Tensor, b: Tensor, w: Tensor, activation: str = "relu", slope: float = 0.01, first_positive: int = 0,
    include_diagonal: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """a (n, h), b (m, h), w (h,) -> J (), L (), differentiable in all three; float32 for half-precision inputs."""
    phi = ACTIVATIONS[activation][0]
    a, b, w = (t if t.dtype == torch.float64 else t.float() for t in (a, b, w))
    return moments(phi(a[:, None] + b[None], slope) @ w, first_positive, include_diagonal)


def unsupported(*tensors: Tensor) -> str | None:
    return None


def forward(
    a: Tensor, b: Tensor, w: Tensor, activation: str, slope: float, first_positive: int, include_diagonal: bool,
    need_a: bool, need_b: bool, need_w: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> J (), L () and the gradients of L: (n, h), (m, h), (h,), each empty unless needed."""
    phi, phi_slope = ACTIVATIONS[activation]
    dtypes = [t.dtype for t in (a, b, w)]
    a, b, w = (t if t.dtype == torch.float64 else t.float() for t in (a, b, w))
    t = a[:, None] + b[None]  # (n, m, h)
    scores = phi(t, slope) @ w
    j, el = moments(scores, first_positive, include_diagonal)
    mask = pair_mask(a.shape[0], b.shape[0], first_positive, include_diagonal, a.device)
    p = torch.softmax(scores.masked_fill(~mask, float("-inf")).flatten(), 0).view_as(scores)
    g = p[..., None] * phi_slope(t, slope) if need_a or need_b else t
    ga = g.sum(1) * w if need_a else a.new_empty(0)
    gb = g.sum(0) * w if need_b else b.new_empty(0)
    gw = torch.einsum("ij,ijh->h", p, phi(t, slope)) if need_w else w.new_empty(0)
    return j, el, ga.to(dtypes[0]), gb.to(dtypes[1]), gw.to(dtypes[2])
