"""What the contrastive losses share besides the passes over all pairs: groups, weights, reductions.  All O(n d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.collectives import gather
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.numerics import sum_dtype

GROUP_MODES = ("mask", "positives")
REDUCTIONS = ("mean", "sum", "none")


def check_features(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) each, of one dtype on one device -> contiguous, under autocast in the dtype a matmul would take."""
    checks.matrices(image_features=image_features, text_features=text_features)
    x, y = checks.autocast(image_features, text_features)
    if x.dtype != y.dtype or x.device != y.device or x.shape != y.shape:
        checks.same_place(image_features=x, text_features=y)
        checks.same_rows(image_features=x, text_features=y)
        checks.same_width(image_features=x, text_features=y)
    return x.contiguous(), y.contiguous()


def check_ids(group_ids: Tensor | None, like: Tensor) -> Tensor | None:
    """(n,) integers on the features' device -> int64."""
    if group_ids is None:
        return None
    if not isinstance(group_ids, Tensor) or group_ids.dtype.is_floating_point or group_ids.dtype.is_complex:
        kind = group_ids.dtype if isinstance(group_ids, Tensor) else type(group_ids).__name__
        raise TypeError(f"group_ids must be a tensor of integers, got {kind}")
    _same_rows("group_ids", group_ids, like)
    return checks.usable(group_ids.long().contiguous())


def check_weights(weights: Tensor | None, like: Tensor) -> Tensor | None:
    """(n,) floating numbers on the features' device -> float32 (float64 beside float64 features)."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.dtype.is_floating_point:
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"weights must be a floating tensor, got {kind}")
    _same_rows("weights", weights, like)
    return checks.usable(weights.to(sum_dtype(like)))


def _same_rows(name: str, t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape[:1]:
        raise ValueError(f"{name} must have shape ({like.shape[0]},), one per pair, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device} but the features are on {like.device}")


def check_negatives(name: str, negatives: Tensor | None, like: Tensor) -> Tensor | None:
    """(k, d) features like the others."""
    if negatives is None:
        return None
    checks.matrix(name, negatives)
    (negatives,) = checks.autocast(negatives)
    checks.same_place(**{name: negatives, "image_features": like})
    checks.same_width(**{name: negatives, "image_features": like})
    return checks.usable(negatives)


def refuse_together(option: str, others: dict[str, Any]) -> None:
    """Raises ValueError where an option is given with one that it does not combine with."""
    for name, given in others.items():
        if given:
            raise ValueError(f"{option} and {name} do not go together")


@dataclass(frozen=True)
class Groups:
    """The group of each of this rank's rows and of each column."""

    rows: Tensor  # (n,) int64
    cols: Tensor  # (m,) int64

    @staticmethod
    def of(ids: Tensor | None, shards: Shards | None) -> Groups | None:
        """Columns are the rows of all ranks."""
        if ids is None:
            return None
        return Groups(ids, ids if shards is None else gather(ids, shards))

    def columns(self, extra: int) -> Tensor:
        """The columns' groups, (m + extra,), where the last ones belong to none."""
        return torch.cat([self.cols, (self.cols.min() - 1).expand(extra)]) if extra else self.cols

    def sums(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """columns (m, d) -> the sum of those in each row's group (n, d), and their number (n,); differentiable."""
        ordered, order = torch.sort(self.cols, stable=True)
        first = torch.searchsorted(ordered, ordered)
        size = torch.searchsorted(ordered, ordered, right=True) - first
        starts = first == torch.arange(ordered.shape[0], device=ordered.device)
        # a group's sum stands at its first place in the order; the places of its other members hold nothing
        lengths = torch.where(starts, size, 0)
        sums = torch.segment_reduce(columns[order], "sum", lengths=lengths, axis=0, unsafe=True)  # checks would wait
        place = torch.searchsorted(ordered, self.rows)
        return sums[place], size[place]


def reduce(losses: Tensor, weights: Tensor | None, reduction: str, shards: Shards | None) -> Tensor:
    """losses (n,) of this rank's pairs -> (n,) or (): with ranks, their results' mean is that of the whole batch.

    "mean" is the weighted mean, "sum" the weighted sum, "none" the losses times their weights.
    """
    weighted = losses if weights is None else losses * weights
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum() if shards is None else weighted.sum() * shards.world
    if weights is None:
        return weighted.mean() if shards is None else weighted.mean() * shards.share
    if shards is None:
        return weighted.sum() / weights.sum()
    return weighted.sum() / merge.total(weights.sum(), shards) * shards.world


def pair_weights(losses_like: Tensor, weights: Tensor | None, reduction: str, shards: Shards | None) -> Tensor:
    """(n,): what `reduce` multiplies each pair's loss with before it adds them up, for "mean" and "sum"."""
    world, one = 1 if shards is None else shards.world, losses_like.new_ones(losses_like.shape)
    if reduction == "sum":
        return (one if weights is None else weights) * world
    if weights is None:
        return one * (world / (losses_like.shape[0] if shards is None else shards.total))  # a traced size stays one
    total = weights.sum() if shards is None else merge.total(weights.sum(), shards)
    return weights * (world / total)
