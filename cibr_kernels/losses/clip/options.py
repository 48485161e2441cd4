"""What the losses can be told about their negatives and their targets: an object for each of the two questions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from cibr_kernels import checks

DIRECTIONS = ("image_to_text", "text_to_image", "image_to_image", "text_to_text")
HARDNESS_ON = ("all", "in_batch", "own")


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """What stands in the denominators of `clip_loss`, and with which weight; the negative pairs of `siglip_loss`.

    directions: which similarities, "image_to_text" among them, which holds the positive.  "image_to_image" and
        "text_to_text" are the same-side negatives: the anchor against the other rows of its own side, itself left out.
        An image is an anchor of the two that begin with it, a text of the others where there are any.
    joint: False, a softmax per anchor, and the mean of the two anchors' losses (SimCLR with all four directions); True,
        one softmax per pair over all directions, with the positive once (GTE, 2308.03281, equation 5; Qwen3-Embedding,
        2506.05176, with all but text_to_image).
    texts, images: (n, k, d), each image's own hard texts, and each text's own hard images, which are nobody else's
        negatives; k may differ.  For those that all anchors share, (k, d), see `text_negatives` of `clip_loss`.
    hardness: alpha >= 0; adds alpha <anchor, negative>, without gradient, to the logits of the negatives (Lan et al.
        2025, 2503.04812, equation 5, where it is 9).
    hardness_on: "all" negatives, those "in_batch" (and in a queue), or only each anchor's "own" (EmbeddingGemma,
        2509.20354, where hardness is 5).
    margin: a candidate whose similarity is above that of the anchor's pair by more than this is taken for a false
        negative and dropped, from every set (Qwen3-Embedding, 2506.05176, where it is 0.1).  No gradient flows through
        the choice.  Two passes of one-way logits instead of one for both directions; not with strategy "ring".

    Raises ValueError for directions, a hardness or a combination that make no sense.
    """

    directions: tuple[str, ...] = ("image_to_text", "text_to_image")
    joint: bool = False
    texts: Tensor | None = None
    images: Tensor | None = None
    hardness: float = 0.0
    hardness_on: str = "all"
    margin: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "directions", tuple(self.directions))
        unknown = [name for name in self.directions if name not in DIRECTIONS]
        if unknown:
            raise ValueError(f"directions has {unknown[0]!r}; known are {', '.join(DIRECTIONS)}")
        if "image_to_text" not in self.directions:
            raise ValueError("directions lacks 'image_to_text', which holds the positives")
        checks.choice("hardness_on", self.hardness_on, HARDNESS_ON)
        if not 0 <= self.hardness < math.inf:
            raise ValueError(f"hardness must be finite and not negative, got {self.hardness}")
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"margin must be finite and not negative, got {self.margin}")
        if self.images is not None and "text_to_image" not in self.directions:
            raise ValueError("images are hard negatives of text_to_image, which is not among the directions")
        if self.hardness and self.hardness_on == "own" and self.texts is None and self.images is None:
            raise ValueError("hardness_on='own' weighs each anchor's own negatives: give texts or images")

    @property
    def one_way(self) -> bool:
        """Whether texts have no images among their candidates."""
        return "text_to_image" not in self.directions

    def options(self) -> tuple[Any, ...]:
        """What all ranks must agree on."""
        own = self.texts is not None, self.images is not None
        return self.directions, self.joint, self.hardness, self.hardness_on, self.margin, own

    def checked(self, like: Tensor) -> Negatives:
        """With tensors in the dtype of the features `like` (n, d).  Raises TypeError or ValueError in words."""
        return replace(self, texts=_own("texts", self.texts, like), images=_own("images", self.images, like))


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Near duplicates share the target of `clip_loss`, by the similarity of features that are not trained here.

        q_ij = (1 - share) [i = j] + share softmax_j(scale <guide_i, guide_j>)

    guide: (n, g), one row a pair, usually of unit norm: a frozen encoder's features of its caption, for example.  No
        gradient flows into it.
    scale: 1 / temperature of the guide's softmax, a positive number.
    share: in (0, 1].

    Raises ValueError for a scale or a share out of range.  Source: SoftCLIP (2303.17561), equation 6.
    """

    guide: Tensor
    scale: float
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale of SoftTargets must be positive and finite, got {self.scale}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share of SoftTargets must lie in (0, 1], got {self.share}")

    def options(self) -> tuple[Any, ...]:
        """What all ranks must agree on."""
        return self.scale, self.share, self.guide.shape[-1] if isinstance(self.guide, Tensor) else None

    def checked(self, like: Tensor) -> SoftTargets:
        """Without a gradient, beside the features `like` (n, d).  Raises TypeError or ValueError in words."""
        checks.matrix("guide", self.guide)
        checks.one_precision(guide=self.guide, image_features=like)
        checks.same_rows(guide=self.guide, image_features=like)
        return replace(self, guide=checks.usable(self.guide).detach())


def _own(name: str, t: Tensor | None, like: Tensor) -> Tensor | None:
    """(n, k, d) features like the others."""
    if t is None:
        return None
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} of Negatives must be a tensor, got {type(t).__name__}")
    if t.dim() != 3 or t.shape[0] != like.shape[0] or t.shape[2] != like.shape[1] or not t.shape[1]:
        n, d = like.shape
        raise ValueError(f"{name} of Negatives must have shape ({n}, k, {d}), k of each pair, got {tuple(t.shape)}")
    (t,) = checks.autocast(t)
    checks.same_place(**{name: t, "image_features": like})
    return checks.usable(t)
