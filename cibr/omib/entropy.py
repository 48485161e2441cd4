"""Entropies and mutual information in nats of rows of data, for the bounds of beta.

    discrete    H = -sum p log p over equal rows                     of integers
    gaussian    H = 1/2 logdet(2 pi e Cov)                           exact for Gaussians, otherwise an upper bound
    knn         H = psi(n) - psi(k) + log c_d + d mean log eps       Kozachenko and Leonenko; I by KSG, cond-mat/0305641
    mine_self   H = I(v; v) by MINE                                  what the paper does; infinite for continuous v

KSG: I = psi(k) + psi(n) - mean[psi(n_x + 1) + psi(n_z + 1)], n_x the rows closer in x than the k-th neighbour in both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cibr_kernels as ck
from cibr.errors import UsageError, missing_extra

KINDS = ("gaussian", "knn", "discrete", "mine_self")
NEIGHBOURS = 3
MINE_ROWS, MINE_STEPS, MINE_HIDDEN, MINE_LR = 256, 200, 64, 3e-3


def entropies(views: Sequence[Tensor], kind: str, seed: int = 0) -> tuple[list[float], float]:
    """Views (n, d_i) -> the entropy of each and their total correlation, which of two is the mutual information.

    sum H_i - H(all) = I(v_1; v_2) + I(v_1 v_2; v_3) + ...; an estimate below 0 counts as 0.  Raises UsageError for an
    unknown kind, for fewer than eight rows and for what a kind cannot take.
    """
    if kind not in KINDS:
        raise UsageError(f"entropy is {kind!r}; known are {', '.join(KINDS)}")
    for i, view in enumerate(views):
        if view.ndim != 2 or len(view) != len(views[0]) or len(view) < 8:
            raise UsageError(
                f"view {i} has shape {tuple(view.shape)}, but must be eight rows or more, as many as view 0"
            )
        if not torch.isfinite(view).all():
            raise UsageError(f"view {i} has values that are not finite")
    rows = [view.detach().cpu().double() for view in views]
    if kind == "mine_self":
        warnings.warn(
            "MINE of a variable with itself has no value for a continuous one: the truth is infinite, and what is "
            f"read is near log n = {math.log(len(rows[0]) // 2):.1f} whatever the data are",
            stacklevel=2,
        )
    own = [entropy(view, kind, seed) for view in rows]
    shared = 0.0
    for i in range(1, len(rows)):
        shared += max(0.0, information(torch.cat(rows[:i], 1), rows[i], kind, seed))
    return own, shared


def entropy(v: Tensor, kind: str, seed: int = 0) -> float:
    """Of the rows of v (n, d) float64."""
    if kind == "discrete":
        return _discrete(v)
    if kind == "gaussian":
        return _gaussian(v)
    return _kozachenko_leonenko(v) if kind == "knn" else _mine(v, v, seed)


def information(x: Tensor, z: Tensor, kind: str, seed: int = 0) -> float:
    """Between the rows of x (n, dx) and z (n, dz)."""
    if kind == "knn":
        return _ksg(x, z)
    if kind == "mine_self":
        return _mine(x, z, seed)
    return entropy(x, kind) + entropy(z, kind) - entropy(torch.cat([x, z], 1), kind)


def _discrete(v: Tensor) -> float:
    if not torch.equal(v, v.round()):
        raise UsageError(
            "entropy 'discrete' counts equal rows and takes whole numbers; for others, 'knn' or 'gaussian'"
        )
    share = np.unique(v.numpy(), axis=0, return_counts=True)[1] / len(v)
    return float(-(share * np.log(share)).sum())


def _gaussian(v: Tensor) -> float:
    d = v.shape[1]
    value = (
        d * math.log(2 * math.pi * math.e) + torch.linalg.slogdet(torch.cov(v.T).reshape(d, d)).logabsdet.item()
    ) / 2
    if len(v) <= d or value < -1e3:
        raise UsageError(f"{len(v)} rows of {d} columns have a singular covariance, and no Gaussian entropy")
    return value


def _kozachenko_leonenko(v: Tensor) -> float:
    n, d = v.shape
    distance = torch.from_numpy(
        _neighbours().NearestNeighbors(n_neighbors=NEIGHBOURS + 1).fit(v).kneighbors(v)[0][:, -1]
    )
    if (distance == 0).any():
        raise UsageError("entropy 'knn' needs rows that differ: some have equal neighbours; take 'discrete'")
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)  # log of the volume of the unit ball
    return _psi(n) - _psi(NEIGHBOURS) + ball + d * distance.log().mean().item()


def _ksg(x: Tensor, z: Tensor) -> float:
    neighbours = _neighbours()
    both = torch.cat([x, z], 1)
    search = neighbours.NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="chebyshev").fit(both)
    radius = np.nextafter(search.kneighbors(both)[0][:, -1], 0)  # strictly closer
    counts = [neighbours.KDTree(v, metric="chebyshev").query_radius(v, radius, count_only=True) for v in (x, z)]
    near = sum(torch.digamma(torch.from_numpy(count).double()).mean().item() for count in counts)
    return _psi(NEIGHBOURS) + _psi(len(x)) - near  # a row counts itself: n_x + 1


def _psi(n: int) -> float:
    return torch.digamma(torch.tensor(float(n), dtype=torch.float64)).item()


def _neighbours() -> Any:
    try:
        from sklearn import neighbors
    except ImportError as error:
        raise missing_extra(error) from error
    return neighbors


def _mine(x: Tensor, z: Tensor, seed: int) -> float:
    """By a critic of half of the rows, read on the other half: at most log n, as the pairs include the diagonal.

    Without it a critic that has seen every row of v beside itself alone reads anything, below zero too.
    """
    x, z = ((v - v.mean(0)) / v.std(0).clamp(min=1e-8) for v in (x.float(), z.float()))
    half, generator = len(x) // 2, torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(seed)
        critic = ck.nn.ConcatCritic(x.shape[1], z.shape[1], MINE_HIDDEN)
        optimizer = torch.optim.Adam(critic.parameters(), lr=MINE_LR)
        for _ in range(MINE_STEPS):
            rows = torch.randperm(half, generator=generator)[:MINE_ROWS]
            loss = -ck.mutual_information(x[rows], z[rows], critic, diagonal="include")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ck.mutual_information(x[half:], z[half:], critic.requires_grad_(False), diagonal="include").item()
