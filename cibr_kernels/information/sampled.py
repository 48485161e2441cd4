"""Scores of k partners per row: O(k n) numbers, and O(n) rows of features at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from cibr_kernels.distributed.collectives import halo
from cibr_kernels.information.critics import Additive, family
from cibr_kernels.information.negatives import Derangement, Permutation, Shifts, order
from cibr_kernels.information.pairs import Pairs
from cibr_kernels.information.panels import recomputed


def sampled_scores(pairs: Pairs) -> Tensor:
    """-> (k + 1, n): row 0 the positives, then the k partners of every row.

    Shifts pair row i with the k rows after it in the cyclic order of the whole batch, of all ranks; a derangement does
    so in a random order of the rows.
    """
    x, z, chosen, shards = pairs.x, pairs.z, pairs.negatives, pairs.shards
    assert isinstance(chosen, (Shifts, Derangement, Permutation))
    n, k = x.shape[0], chosen.k
    if isinstance(chosen, Derangement):
        place = order(chosen, n, x.device)
        x, z = x[place], z[place]
    if isinstance(chosen, Shifts) and shards is not None:
        z = torch.cat([z, halo(z, k, shards)])  # (n + k, dz)
    scored = family(pairs.critic, x, z, pairs.backend)
    if isinstance(scored, Additive) and not isinstance(chosen, Permutation):
        return scored.shifted(k + 1)
    rows = []
    for s in range(k + 1):
        drawn = order(chosen, n, x.device) if s and isinstance(chosen, Permutation) else None

        def shifted(left: Tensor, right: Tensor, s: int = s, drawn: Tensor | None = drawn) -> Tensor:
            # the partners are taken in here, so that the backward keeps one copy of the columns, not k
            return scored.paired(left, right.roll(-s, 0)[: left.shape[0]] if drawn is None else right[drawn])

        rows.append(recomputed(shifted, scored.left, scored.right, random=scored.random))
    return torch.stack(rows)
