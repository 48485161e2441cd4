"""Critics of every kind, and the estimators as formulas on their n x m scores."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from cases import leaves
from torch import Tensor, nn

import cibr_kernels as ck
from cibr_kernels import testing
from cibr_kernels.information.estimators import BOUNDS

N, DX, DZ, QUEUE = 37, 6, 4, 11
CONTRASTS = ("js", "smile", "infonce")
SMALL = 4 * (N + QUEUE) * 20  # a budget that makes several panels of every critic


class Pairwise(nn.Module):
    """A bilinear critic with tanh that only has `pairwise` and `paired`."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Linear(DX, DZ)

    def pairwise(self, x: Tensor, z: Tensor) -> Tensor:
        return 3 * torch.tanh(self.m(x) @ z.T)

    def paired(self, x: Tensor, z: Tensor) -> Tensor:
        return 3 * torch.tanh((self.m(x) * z).sum(-1))


class Callable(nn.Module):
    """A critic of matching rows and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DX + DZ, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 3 * self.net(torch.cat([x, z], 1)).squeeze(1)


CRITICS: dict[str, Any] = {
    "relu": lambda: ck.nn.ConcatCritic(DX, DZ, 24),
    "silu": lambda: ck.nn.ConcatCritic(DX, DZ, 24, activation="silu"),
    "two layers": lambda: ck.nn.ConcatCritic(DX, DZ, 24, layers=2, activation="softplus"),
    "separable": lambda: ck.nn.SeparableCritic(DX, DZ, 24, 10),
    "pairwise": Pairwise,
    "callable": Callable,
}


def made(name: str) -> nn.Module:
    torch.manual_seed(7)
    critic = CRITICS[name]()
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(2)  # scores beyond the clamp of `smile`
    return critic


def all_scores(critic: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """(n, m), one pair at a time where the critic knows no better."""
    if hasattr(critic, "pairwise"):
        return critic.pairwise(x, z)
    return torch.stack([critic(row.expand(len(z), -1), z) for row in x])


def formula(estimator: str, positives: Tensor, marginal: Tensor, *, tau: float = 5.0, columns: Tensor | None = None):
    """positives (n,), marginal scores (n, c); columns (n, M), those of InfoNCE's rows."""
    js = F.logsigmoid(positives).mean() + F.logsigmoid(-marginal).mean()
    if estimator == "js":
        return js
    if estimator == "smile":
        value = positives.mean() - marginal.clamp(-tau, tau).exp().mean().log()
        return value.detach() + js - js.detach()
    assert columns is not None
    return (positives - columns.exp().sum(1).log()).mean() + math.log(columns.shape[1])


def definition(estimator, x, z, critic, *, negatives="all", diagonal="exclude", marginals=None, **options):
    n = len(x)
    scores = all_scores(critic, x, z if marginals is None else torch.cat([z, marginals]))
    i = torch.arange(n)
    positives = scores[i, i]
    if negatives == "all":
        off = scores[i[:, None] != torch.arange(scores.shape[1])].view(n, -1)
        return formula(estimator, positives, scores if diagonal == "include" else off, columns=scores, **options)
    chosen = torch.stack([scores[i, (i + s) % n] for s in range(1, negatives.k + 1)], 1)
    return formula(estimator, positives, chosen, columns=torch.cat([positives[:, None], chosen], 1), **options)


def by_scores(scores: Tensor, estimator: str) -> Tensor:
    """Any estimate of n x n scores, in their dtype."""
    n = len(scores)
    positives, off = scores.diagonal(), scores[~torch.eye(n, dtype=torch.bool)].view(n, -1)
    if estimator in BOUNDS:
        return ck.bound(positives.mean(), off.flatten().logsumexp(0) - math.log(off.numel()), estimator)
    return formula(estimator, positives, off, columns=scores)


def data() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x, z, queue = (torch.randn(n, d, generator=g) for n, d in ((N, DX), (N, DZ), (QUEUE, DZ)))
    return x, z + x[:, :DZ], queue


def with_gradients(f, critic: nn.Module, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    critic = critic.to(dtype)
    inputs = leaves(*tensors, dtype=dtype)
    value = f(critic, *inputs)
    return [value.detach(), *torch.autograd.grad(value, [*inputs, *critic.parameters()])]


def check(ours, truth, critic: nn.Module, tensors: tuple[Tensor, ...], vectors: float = 0.0) -> None:
    """`ours` and `truth` are functions of (critic, *tensors); the eager float32 of the rule is `truth` in float32.

    vectors: the magnitude of 1-d gradients, where they cancel.
    """
    exact = with_gradients(truth, critic, tensors, torch.float64)
    eager = with_gradients(truth, critic, tensors, torch.float32)
    actual = with_gradients(ours, critic, tensors, torch.float32)
    assert len(exact) == len(actual) and actual[0].dtype == torch.float32
    for k, (a, e, t) in enumerate(zip(actual, eager, exact, strict=True)):
        # the output bias's gradient is a difference of sums near 1, as the value is of J and L; so is one that is 0 but
        # for the rounding of float64, as that of a separable critic's last bias of z in InfoNCE
        cancels = t.numel() == 1 or t.abs().max() < 1e-14
        magnitude = 1.0 if cancels else vectors if t.dim() == 1 else 0.0
        testing.assert_close(
            f"output {k}", a, e, t, terms=N * (N + QUEUE), exponent=20, features=torch.float32, magnitude=magnitude
        )
