"""Which pairs stand for the product of marginals: all n^2 of them, or k partners of every row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Shifts:
    """The marginal of k cyclic shifts of the batch: see `shifts`."""

    k: int


@dataclass(frozen=True)
class Derangement:
    """The marginal of k random derangements: see `derangement`."""

    k: int
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Permutation:
    """The marginal of k random permutations: see `permutation`."""

    k: int
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)


Negatives = str | Shifts | Derangement | Permutation


def shifts(k: int) -> Shifts:
    """k cyclic shifts of the batch as the product of marginals: pairs (i, (i + s) mod n) for s = 1 ... k.

    Derangements, all pairs distinct; the batch must be in random order.  k = 1 is MINE's single shuffle: cheap, but its
    estimate is so noisy that the CIBR penalty is slow or fails (`python bench/ toy`).  Raises ValueError for k < 1, and
    at use for k >= n.
    """
    return Shifts(_count("shifts", k))


def derangement(k: int, *, generator: torch.Generator | None = None) -> Derangement:
    """k random derangements, drawn anew at every use: `shifts(k)` of the batch in a random order.

    No row is its own partner, no two of the derangements share a pair, and a row's partners are uniform among the
    others.  For batches that are not in random order; on one process.  `generator`: one of the features' device saves a
    copy.  Raises ValueError for k < 1, and at use for k >= n or more than one rank.
    """
    return Derangement(_count("derangement", k), generator)


def permutation(k: int, *, generator: torch.Generator | None = None) -> Permutation:
    """k independent random permutations, drawn anew at every use, as f-DIME (NeurIPS 2024) trains with.

    Each has one fixed point on average, a positive among the negatives, which adds e^2I / n to the mean of e^T and caps
    DV near log n: prefer `derangement`.  Raises ValueError for k < 1, and at use for more than one rank.
    """
    return Permutation(_count("permutation", k), generator)


def _count(name: str, k: int) -> int:
    if k < 1:
        raise ValueError(f"{name} needs k >= 1, got {k}")
    return k


def check_negatives(negatives: object) -> None:
    """Raises ValueError for what is no choice of negatives."""
    if negatives != "all" and not isinstance(negatives, (Shifts, Derangement, Permutation)):
        raise ValueError(f"negatives is {negatives!r}; known are 'all', shifts(k), derangement(k) and permutation(k)")


def check_partners(negatives: Negatives, n: int, world: int) -> None:
    """Raises ValueError where n rows on `world` ranks do not have such partners."""
    if isinstance(negatives, (Shifts, Derangement)) and negatives.k >= n:
        name = type(negatives).__name__.lower()
        raise ValueError(f"{name}({negatives.k}) needs more than {negatives.k} rows, got {n}")
    if isinstance(negatives, (Derangement, Permutation)) and world > 1:
        name = type(negatives).__name__.lower()
        raise ValueError(f"{name} would need rows of every rank on every rank: use shifts(k) or 'all' on {world} ranks")


def order(negatives: Derangement | Permutation, n: int, device: torch.device) -> torch.Tensor:
    """(n,) int64, a random order of n rows."""
    generator = negatives.generator
    if generator is None:  # not passed on: compilers refuse one beside a symbolic size
        return torch.randperm(n, device=device)
    return torch.randperm(n, generator=generator, device=generator.device).to(device)
