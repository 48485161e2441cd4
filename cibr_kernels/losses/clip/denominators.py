"""`clip_loss` with a choice of negatives: log-sum-exps of several sets of candidates, merged per anchor or per pair.

    R_i^s = log sum_{j in s} exp(l_ij + alpha sg(c_ij))      over a set s of anchor i's negatives, c the similarity,
                                                             those with c_ij > c_ii + margin left out
    loss_i = softplus(log sum_s exp R_i^s - p_i)             the sets of one anchor, or with `joint` of one pair

Similarities of all pairs come from `dot_lse`, a pass each for images and texts, images and images, texts and texts.
A hardness needs no other kernel: alpha joins the scale, and the gradient that goes through it is taken out again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cibr_kernels.losses.clip.directions import Problem
from cibr_kernels.losses.clip.options import Negatives
from cibr_kernels.numerics import logsumexp, promote, softplus


def pair_losses(problem: Problem, negatives: Negatives) -> Tensor:
    """-> (n,) nats, the mean of a pair's anchors or its one loss over all directions."""
    asked = negatives.directions
    shared = _Harder.of(problem.scale, negatives.hardness if negatives.hardness_on != "own" else 0.0)
    alone = _Harder.of(problem.scale, negatives.hardness if negatives.hardness_on != "in_batch" else 0.0)
    limits = None if negatives.margin is None else _similarities(problem) + negatives.margin
    in_batch = replace(problem, scale=shared.scale, limits=limits)
    ways, positives = in_batch.directions()
    positives = positives * shared.ratio  # of the scale without hardness, in value and in gradient
    sets = [[shared.restored(way.rows)] for way in ways]
    image, text = sets[0], sets[1] if len(sets) == 2 else []
    if "image_to_image" in asked:
        image.append(shared.restored(in_batch.sums_within(problem.image)))
    if "text_to_text" in asked:
        text.append(shared.restored(in_batch.sums_within(problem.text)))
    if negatives.texts is not None:
        image.append(alone.restored(_of_own(problem.image, negatives.texts, alone.scale, limits)))
    if negatives.images is not None:
        text.append(alone.restored(_of_own(problem.text, negatives.images, alone.scale, limits)))
    anchors = [image + text] if negatives.joint else [sets for sets in (image, text) if sets]
    losses = [softplus(_merged(sets) - positives) for sets in anchors]
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


@torch.no_grad()
def _similarities(problem: Problem) -> Tensor:
    """(n,): <x_i, y_i>."""
    return (promote(problem.image) * promote(problem.text)).sum(1)


def _of_own(anchors: Tensor, candidates: Tensor, scale: Tensor, limits: Tensor | None) -> Tensor:
    """anchors (n, d), each one's candidates (n, k, d), scale () or (n,) -> log-sum-exp (n,) of the logits of those that
    are not above the limit (n,) of similarities."""
    cosines = (promote(candidates) @ promote(anchors)[:, :, None]).squeeze(2)
    logits = scale.reshape(-1, 1) * cosines
    if limits is not None:
        logits = logits.masked_fill(cosines > limits[:, None], -math.inf)
    return logsumexp(logits, 1)


def _merged(sets: list[Tensor]) -> Tensor:
    """The log-sum-exp over all sets, (n,); -inf without gradient where they are empty."""
    return sets[0] if len(sets) == 1 else logsumexp(torch.stack(sets), 0)


@dataclass(frozen=True)
class _Harder:
    """exp(s c + alpha sg(c)) as exp((s / r) c), r = s / (s + alpha) a constant: its logarithm has the value and the
    derivative in s; the derivatives in the features are r times its own."""

    scale: Tensor  # () or (n,): s / r
    ratio: Tensor | float  # r, without gradient

    @staticmethod
    def of(scale: Tensor, hardness: float) -> _Harder:
        if not hardness:
            return _Harder(scale, 1.0)
        ratio = (scale / (scale + hardness)).detach()
        return _Harder(scale / ratio, ratio)

    def restored(self, sums: Tensor) -> Tensor:
        """Log-sum-exps (n,) at `self.scale`: the same numbers, r times their gradient."""
        return sums if isinstance(self.ratio, float) else self.ratio * sums + ((1 - self.ratio) * sums).detach()
