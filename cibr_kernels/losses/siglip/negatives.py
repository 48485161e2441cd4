"""`siglip_loss` with `Negatives`: more pairs with the label -1, each of them once.

    images with images    sum_{i < j} softplus(scale <x_i, x_j> + bias), and texts with texts
    own candidates        sum_i sum_k softplus(scale <x_i, texts_ik> + bias), and images of texts

A pair of one side belongs half to either row, as that of an image and a text does.  The first are a pass of
`dot_softplus` a side, the others O(n k d).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from cibr_kernels.distributed.shards import Shards
from cibr_kernels.distributed.softplus import sharded_dot_softplus, sharded_dot_softplus_sums
from cibr_kernels.losses.clip.options import Negatives
from cibr_kernels.numerics import promote, softplus
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums


def refuse(negatives: Negatives, group_mode: str) -> None:
    """Raises ValueError, with the reason, for what is about a softmax."""
    if negatives.one_way:
        raise ValueError(
            "siglip_loss needs both 'image_to_text' and 'text_to_image' among the directions: a sigmoid counts a pair "
            "once, for both"
        )
    if negatives.joint:
        raise ValueError("siglip_loss has no joint: it asks for one softmax over all directions, and there is none")
    if negatives.hardness:
        raise ValueError("siglip_loss has no hardness: it weighs candidates in a softmax's denominator, and has none")
    if negatives.margin is not None:
        raise ValueError("siglip_loss has no margin: the kernels of sigmoids know no limits; mask pairs by group_ids")
    if group_mode == "positives":
        raise ValueError("negatives and group_mode 'positives' do not go together")


def total(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, negatives: Negatives, c: Tensor, weighted: bool,
    shards: Shards | None, strategy: str, **common: Any,
) -> Tensor:  # fmt: skip
    """x, y (n, d), c (n,) what each pair's loss is multiplied with -> ()."""
    found = c.new_zeros(())
    u, v = (c / 4, c / 4) if weighted else (c / 2, None)  # every pair stands twice in the matrix of a side
    for side in _sides(x, y, negatives):
        if shards is None:
            found = found + dot_softplus(side, side, scale, bias, u, v, **common)
        else:
            found = found + sharded_dot_softplus(side, side, scale, bias, u, v, shards, strategy=strategy, **common)
    for sums in _own(x, y, scale, bias, negatives):
        found = found + (c * sums).sum()
    return found


def per_pair(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, negatives: Negatives, shards: Shards | None, **common: Any
) -> Tensor:
    """x, y (n, d) -> (n,): each row's half of its pairs, and its own candidates."""
    found = x.new_zeros(x.shape[0], dtype=scale.dtype)
    for side in _sides(x, y, negatives):
        if shards is None:
            rows, cols = dot_softplus_sums(side, side, scale, bias, **common)
        else:
            rows, cols = sharded_dot_softplus_sums(side, side, scale, bias, shards, **common)
        found = found + (rows + cols) / 4
    for sums in _own(x, y, scale, bias, negatives):
        found = found + sums
    return found


def _sides(x: Tensor, y: Tensor, negatives: Negatives) -> Iterator[Tensor]:
    for name, side in (("image_to_image", x), ("text_to_text", y)):
        if name in negatives.directions:
            yield side


def _own(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, negatives: Negatives) -> Iterator[Tensor]:
    """The sums over each anchor's own candidates, (n,)."""
    for anchors, candidates in ((x, negatives.texts), (y, negatives.images)):
        if candidates is not None:
            cosines = (promote(candidates) @ promote(anchors)[:, :, None]).squeeze(2)
            yield softplus(scale * cosines + bias).sum(1)
