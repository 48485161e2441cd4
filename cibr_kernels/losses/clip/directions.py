"""The two directions of the CLIP loss: every anchor's loss over its candidates, as an O(n d) function of `dot_lse`.

    p_i  the logit of anchor i's positive        R_i  log-sum-exp of the other candidates' logits
    t_i  the mean of anchor i's target distribution over its candidates' features

    loss_i = LSE_i - <anchor_i, t_i> = softplus(R_i - p_i) + s_i <anchor_i, y_i - t_i>

The plain loss has t_i = y_i, its positive.  With several positives t_i is their mean, with label smoothing eps the
target is (1 - eps) of that and eps of the mean over all candidates; soft targets take a guide's mean in that place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.collectives import gather
from cibr_kernels.distributed.lse import sharded_dot_lse
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.losses.clip.options import SoftTargets
from cibr_kernels.losses.clip.soft import guided_mean
from cibr_kernels.losses.targets import Groups
from cibr_kernels.numerics import promote, softplus
from cibr_kernels.primitives.dot.lse.op import dot_lse


@dataclass(frozen=True)
class Direction:
    """Anchors of one tower, candidates of the other."""

    anchors: Tensor  # (n, d) this rank's rows
    candidates: Tensor  # (n, d) this rank's
    extra: Tensor | None  # (k, d) candidates that are nobody's positive
    rows: Tensor  # (n,) R
    highest: Tensor | None  # (n,) the largest logit in R; with metrics


@dataclass(frozen=True)
class Problem:
    """One call of the loss: its tensors and options, checked."""

    image: Tensor  # (n, d)
    text: Tensor  # (n, d)
    scale: Tensor  # () or (n,)
    image_negatives: Tensor | None  # (k, d)
    text_negatives: Tensor | None  # (k, d)
    groups: Groups | None
    several_positives: bool
    label_smoothing: float
    soft_targets: SoftTargets | None
    one_way: bool
    metrics: bool
    shards: Shards | None
    strategy: str
    backend: str
    limits: Tensor | None = None  # (n,) similarities above which a candidate is no negative of the pair's anchors

    def directions(self) -> tuple[list[Direction], Tensor]:
        """-> image to text and, unless one_way, text to image; positives (n,)."""
        image, text, scale = self.image, self.text, self.scale
        if scale.dim():  # one per pair: the anchor's, in float32 because bfloat16 would round it into the features
            image, text = promote(image), promote(text)
        ways = [(image, text, self.text_negatives), (text, image, self.image_negatives)][: 1 if self.one_way else 2]
        together = not scale.dim() and self.limits is None
        if len(ways) == 2 and together and (self.image_negatives is None or self.text_negatives is None):
            order = 1 if self.image_negatives is None else -1  # one matrix, whose columns may be more than its rows
            first, second = ways[::order]
            rows, cols, positives, *highest = self.sums(*first, need_cols=True)
            found = [
                Direction(*first, rows, highest[0] if highest else None),
                Direction(*second, cols, highest[1] if highest else None),
            ]
            return found[::order], positives
        found = []
        for anchors, candidates, extra in ways:
            rows, _, positives, *highest = self.sums(anchors, candidates, extra, need_cols=False)
            found.append(Direction(anchors, candidates, extra, rows, highest[0] if highest else None))
        return found, positives

    def sums(self, anchors: Tensor, candidates: Tensor, extra: Tensor | None, need_cols: bool) -> tuple[Tensor, ...]:
        """As `dot_lse`: rows (n,), cols (n,) or (0,), positives (n,), and with metrics the largest of each."""
        scale, shards = self.scale, self.shards
        limits = None if self.limits is None else (scale * self.limits).detach()
        if scale.dim():
            anchors, scale = anchors * scale[:, None], torch.ones_like(scale[0])
            extra = None if extra is None else promote(extra)
        options: dict[str, Any] = {
            "need_max": self.metrics,
            "backend": self.backend,
            "need_cols": need_cols,
            "row_limits": limits,
        }
        if self.groups is not None and not self.several_positives:
            options |= {
                "row_ids": self.groups.rows,
                "col_ids": self.groups.columns(0 if extra is None else extra.shape[0]),
            }
        if shards is not None and extra is None:
            return sharded_dot_lse(anchors, candidates, scale, shards, strategy=self.strategy, **options)
        columns = candidates if shards is None else gather(candidates, shards)
        total, first_positive = columns.shape[0], 0 if shards is None else shards.offset
        columns = columns if extra is None else torch.cat([columns, extra])
        rows, cols, positives, *highest = dot_lse(anchors, columns, scale, first_positive=first_positive, **options)
        if need_cols and extra is not None:  # nobody asks for the sums of extra columns
            cols, highest[1:] = cols[:total], [t[:total] for t in highest[1:]]
            if shards is not None:
                cols, highest[1:] = merge.columns(cols, shards), [merge.largest(t, shards) for t in highest[1:]]
        return rows, cols, positives, *highest

    def sums_within(self, side: Tensor) -> Tensor:
        """side (n, d) -> (n,): the log-sum-exp of each row's logits with the other rows of its own side."""
        return self.sums(promote(side) if self.scale.dim() else side, side, None, need_cols=False)[0]

    def losses(self, way: Direction, positives: Tensor) -> Tensor:
        """-> (n,) nats."""
        loss = softplus(way.rows - positives)
        if not self.several_positives and not self.label_smoothing and self.soft_targets is None:
            return loss
        anchors, own = promote(way.anchors), promote(way.candidates)
        target = own
        if self.several_positives:
            target = self._group_mean(own)
        if self.soft_targets is not None:
            target = target + self.soft_targets.share * (self._guided_mean(own, self.soft_targets) - target)
        if self.label_smoothing:
            target = target + self.label_smoothing * (self._candidate_mean(way, own) - target)
        return loss + self.scale * (anchors * (own - target)).sum(1)

    def _group_mean(self, own: Tensor) -> Tensor:
        """The mean of each anchor's positives, (n, d)."""
        sums, size = self._group_sums(own)
        return sums / size[:, None]

    def _guided_mean(self, own: Tensor, soft: SoftTargets) -> Tensor:
        """The mean of all candidates under the guide's softmax, (n, d)."""
        guide, scale = promote(soft.guide), torch.full((), soft.scale, dtype=own.dtype, device=own.device)
        if self.shards is None:
            return guided_mean(guide, None, own, scale, 0, self.backend)
        columns = gather(guide, self.shards), gather(own, self.shards)
        return guided_mean(guide, *columns, scale, self.shards.offset, self.backend)

    def _group_sums(self, own: Tensor) -> tuple[Tensor, Tensor]:
        assert self.groups is not None
        columns = own if self.shards is None else gather(own, self.shards)
        if self.backend == "reference":  # segments have no second derivative
            same = (self.groups.rows[:, None] == self.groups.cols).to(columns.dtype)
            return same @ columns, same.sum(1)
        return self.groups.sums(columns)

    def _all_candidates(self, way: Direction) -> tuple[Tensor, int]:
        """The sum of all columns' features, (d,), and their number."""
        total, count = promote(way.candidates).sum(0), way.candidates.shape[0]
        if self.shards is not None:
            total, count = merge.vector_total(total, self.shards), self.shards.total
        if way.extra is not None:
            total, count = total + promote(way.extra).sum(0), count + way.extra.shape[0]
        return total, count

    def _candidate_mean(self, way: Direction, own: Tensor) -> Tensor:
        """The mean of what each anchor is compared with, its positive among them, (n or 1, d)."""
        total, count = self._all_candidates(way)
        if self.groups is None or self.several_positives:
            return total[None] / count
        sums, size = self._group_sums(own)
        return (total - sums + own) / (count - size + 1)[:, None]

    def measure(self, ways: list[Direction], positives: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Top-1 accuracies, and the mean logits of positives and of the other candidates; without gradient."""
        shift = 0.0 if bias is None else bias.detach()
        found: dict[str, Tensor] = {}
        for name, way in zip(("image_to_text_top1", "text_to_image_top1"), ways, strict=False):
            assert way.highest is not None
            found[name] = self._mean((positives > way.highest).to(positives.dtype))
        found["positive_logit"] = self._mean(positives) + shift
        found["negative_logit"] = torch.stack([self._negatives(way, positives) for way in ways]).mean() + shift
        return {name: value.detach() for name, value in found.items()}

    def _negatives(self, way: Direction, positives: Tensor) -> Tensor:
        """The mean logit of all pairs but the positives; NaN where there are none."""
        total, count = self._all_candidates(way)
        sums = self.scale * (promote(way.anchors) * total).sum(1) - positives
        return self._mean(sums) / (count - 1 if count > 1 else math.nan)

    def _mean(self, values: Tensor) -> Tensor:
        return values.mean() if self.shards is None else merge.mean(values, self.shards)
