"""Ranks, and retrieval from them.

    rank_i = #{j: s_ij > best_i}     best_i = the greatest s_ij among the j that belong to i,  s = Q C^T
    R@k = share of i with rank_i < k

A query is found at k when any of its candidates is among the k nearest, as clip_benchmark counts. Only strictly greater
scores count: the order in which `torch.topk` returns ties is unspecified, and equal candidates are equally good.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from cibr.errors import UsageError

DEPTHS = (1, 5, 10)
TIES_WORTH_A_WARNING = 0.05  # share of queries; equal captions of two images make fewer


def check_features(name: str, features: Tensor) -> None:
    """Raises UsageError unless `features` is (n, d), n > 0, and finite: a NaN is greater than nothing, so it wins."""
    if features.ndim != 2 or not len(features):
        raise UsageError(f"{name} must have rows and columns, got shape {tuple(features.shape)}")
    if broken := int((~features.isfinite().all(1)).sum()):
        raise UsageError(
            f"{name} are NaN or infinite in {broken} of {len(features)} rows, so there is nothing to measure: "
            "the weights are broken (a diverged run?) or the inputs are"
        )


def ranks(
    queries: Tensor,  # (n, d)
    query_group: Tensor,  # (n,) int64
    candidates: Tensor,  # (m, d)
    candidate_group: Tensor,  # (m,) int64
    *,
    block: int = 1024,
) -> Tensor:
    """(n,) int64: how many candidates score above the best of the query's own group; -1 where it has none.

    Memory is O(block m). Warns when many queries tie with a candidate of another group: collapsed features would shine.
    """
    tied, found = 0, []
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        scores = queries[rows] @ candidates.T
        own = query_group[rows, None] == candidate_group[None, :]
        best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        asked = own.any(1)
        found.append(torch.where(asked, (scores > best).sum(1), -1))
        tied += int((((scores == best) & ~own).any(1) & asked).sum())
    rank = torch.cat(found)
    if tied > TIES_WORTH_A_WARNING * len(rank):
        warnings.warn(
            f"{tied} of {len(rank)} queries score a candidate of another group exactly like their own best: "
            "ties count as found, so the numbers flatter; have the features collapsed, or are they of low precision?",
            stacklevel=2,
        )
    return rank


def recall(rank: Tensor, k: int) -> float:
    """Per cent of the ranks (n,) of at least 0 that are less than k."""
    asked = rank >= 0
    return 100 * int((asked & (rank < k)).sum()) / int(asked.sum())


def recalls(
    image_features: Tensor,  # (n, d) unit norm
    image_group: Tensor,  # (n,) int64
    text_features: Tensor,  # (m, d) unit norm
    text_group: Tensor,  # (m,) int64
) -> dict[str, float]:
    """`image_to_text@k` and `text_to_image@k` in per cent for k = 1, 5, 10: found is a candidate of the same group.

    Queries without a candidate of their group are not asked; candidates without a query stay as distractors.
    Raises UsageError for features that are not finite or fit no others.
    """
    check_features("the image features", image_features)
    check_features("the text features", text_features)
    if image_features.shape[1] != text_features.shape[1]:
        raise UsageError(
            f"image features have {image_features.shape[1]} columns and text features {text_features.shape[1]}: "
            "they are not of one model"
        )
    if not torch.isin(image_group, text_group).any():
        raise UsageError("no image has a caption here, so there is nothing to retrieve")
    to_text = ranks(image_features, image_group, text_features, text_group)
    to_image = ranks(text_features, text_group, image_features, image_group)
    named = (("image_to_text", to_text), ("text_to_image", to_image))
    return {f"{name}@{k}": recall(rank, k) for name, rank in named for k in DEPTHS}


def retrieval(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """`recalls` of n images (n, d) and their captions (m, d), where caption j is of image `image_of_text[j]`."""
    n = len(image_features)
    if len(image_of_text) != len(text_features):
        raise UsageError(f"{len(text_features)} captions, but image_of_text names {len(image_of_text)} images")
    if len(image_of_text) and (image_of_text.min() < 0 or image_of_text.max() >= n):
        raise UsageError(f"image_of_text names image {int(image_of_text.max())}, but there are {n} images")
    return recalls(image_features, torch.arange(n, device=image_of_text.device), text_features, image_of_text)
