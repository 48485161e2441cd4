"""The arguments that every estimate of pairs shares, checked once, and agreed between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed.collectives import gather
from cibr_kernels.distributed.lse import STRATEGIES
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.information import critics
from cibr_kernels.information.negatives import Negatives, check_negatives, check_partners
from cibr_kernels.numerics import WIDE, promote

DIAGONALS = ("exclude", "include")


@dataclass
class Pairs:
    """x (n, dx) and z (n, dz) of this rank, whose rows i are the positives, and what they are paired with."""

    x: Tensor
    z: Tensor
    marginals: Tensor | None  # (q, dz), rows of z that are nobody's positive
    critic: critics.View
    negatives: Negatives
    include: bool  # the diagonal
    shards: Shards | None
    strategy: str
    backend: str

    @property
    def first_positive(self) -> int:
        """The column of row 0's positive."""
        return 0 if self.shards is None else self.shards.offset

    @property
    def columns(self) -> int:
        """Rows of z on all ranks, and the marginals."""
        rows = self.z.shape[0] if self.shards is None else self.shards.total
        return rows + (0 if self.marginals is None else self.marginals.shape[0])

    @property
    def per_row(self) -> int:
        """Columns that are a row's marginal pairs."""
        return self.columns - (0 if self.include else 1)

    def scored(self) -> critics.Additive | critics.Dot | critics.General:
        """The critic on this rank's rows of x and its own columns; `all_columns` brings the others."""
        z = self.z if self.marginals is None else torch.cat([self.z, self.marginals])
        return critics.family(self.critic, self.x, z, self.backend)

    def embedded(self) -> tuple[Tensor, Tensor]:
        """f (n, k), g (n, k) of a separable critic, NaN where the input is not finite."""
        return self.critic.parts(self.x * self.nan_if_not_finite(), self.z)

    def all_columns(self, right: Tensor) -> Tensor:
        """What the critic made of this rank's columns -> of every rank's rows and this rank's marginals."""
        if self.shards is None or self.shards.world == 1:
            return right
        n = self.z.shape[0]
        return torch.cat([gather(right[:n], self.shards), right[n:]])

    def nan_if_not_finite(self) -> Tensor:
        """(): 1, or NaN where the input has a NaN or an infinity, which e^-inf = 0 and clamps would hide."""
        found = self.x.new_ones(())
        for t in (self.x, self.z, self.marginals):
            if t is not None:
                low, high = torch.aminmax(t.detach())
                found = found + 0 * low + 0 * high
        return found


def agree(
    op: str,
    x: Tensor,
    z: Tensor,
    critic: Any,
    *,
    negatives: Negatives,
    diagonal: str,
    marginals: Tensor | None,
    process_group: ProcessGroup | Shards | None,
    strategy: str,
    backend: str,
    ring: bool = True,
    one_argument: bool = False,
    **facts: object,
) -> Pairs:
    """Checks, and with a group agrees on, the arguments of `op`, in words of `critic_moments`.

    ring: whether the estimate can be had from shards that go round.  one_argument: the critic is a function of x alone.
    facts: what else must be alike on all ranks.
    """
    pairs = Pairs(x, z, marginals, critics.view(critic), negatives, diagonal == "include", None, strategy, backend)
    if process_group is None:
        _check(pairs, diagonal, ring, one_argument)
    else:
        checks.choice("strategy", strategy, STRATEGIES)
        shape = None if marginals is None else tuple(marginals.shape)
        options = {"negatives": negatives, "diagonal": diagonal, "strategy": strategy, "marginals": shape, **facts}
        with Agreement(op, process_group, **options) as agreement:
            _check(pairs, diagonal, ring, one_argument)
            agreement.describe(x=pairs.x, z=pairs.z)
        pairs.shards = agreement.shards
    rows, world = (x.shape[0], 1) if pairs.shards is None else (pairs.shards.total, pairs.shards.world)
    if rows < 2 and pairs.columns < 2:
        raise ValueError(f"{op} needs at least 2 rows: one pair has no negatives, got 1")
    if negatives != "all":
        check_partners(negatives, rows, world)
    return pairs


def _check(pairs: Pairs, diagonal: str, ring: bool, one_argument: bool) -> None:
    """Checks this rank's arguments, and promotes its tensors."""
    p = pairs
    checks.matching(x=p.x, z=p.z)
    if diagonal not in DIAGONALS:
        checks.choice("diagonal", diagonal, DIAGONALS)
    if p.negatives != "all" or p.marginals is not None or p.strategy != "gather":
        _check_options(p, ring)
    if p.x.dtype not in WIDE or p.z.dtype not in WIDE:
        p.x, p.z = promote(p.x), promote(p.z)
    if p.marginals is not None:
        checks.one_precision(z=p.z, marginals=p.marginals)
        p.marginals = promote(p.marginals)
    critics.check(p.critic, p.x, p.z, arguments=1 if one_argument else 2)


def _check_options(p: Pairs, ring: bool) -> None:
    checks.choice("strategy", p.strategy, STRATEGIES)
    check_negatives(p.negatives)
    if p.marginals is not None:
        checks.matrix("marginals", p.marginals)
        checks.same_width(z=p.z, marginals=p.marginals)
        if p.negatives != "all":
            raise ValueError(f"marginals are further columns of all pairs, got negatives {p.negatives!r}")
    if p.strategy == "ring":
        if p.critic.form != "dot_parts":
            raise ValueError("strategy 'ring' is for critics with dot_parts (nn.SeparableCritic); others use 'gather'")
        if not ring or p.marginals is not None:
            raise ValueError("strategy 'ring' has no marginals, and neither smile nor club: use 'gather'")
