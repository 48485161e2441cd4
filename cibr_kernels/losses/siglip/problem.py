"""The sigmoid loss of a batch, as an O(n d) function of `dot_softplus`.

    p_i  = scale <x_i, y_i> + bias            c_i  what the loss of pair i is multiplied with before they are added up
    loss = sum_i c_i softplus(-p_i) + sum_{i != j} (c_i + c_j) / 2 softplus(l_ij) + the same of more pairs

More pairs have the label -1: those with queues, and those of `Negatives`, each of them once,

    images with images    sum_{i < j} softplus(scale <x_i, x_j> + bias), and texts with texts
    own candidates        sum_i sum_k softplus(scale <x_i, texts_ik> + bias), and images of texts

A pair of one side belongs half to either row, as that of an image and a text does.  The first are a pass of
`dot_softplus` a side, the others O(n k d).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Shards
from cibr_kernels.distributed.softplus import sharded_dot_softplus, sharded_dot_softplus_sums
from cibr_kernels.losses import targets
from cibr_kernels.losses.clip.options import Negatives
from cibr_kernels.numerics import promote, softplus
from cibr_kernels.primitives.dot.softplus.op import dot_softplus, dot_softplus_sums


@dataclass(frozen=True)
class Problem:
    """One call of the loss: its tensors and options, checked."""

    image: Tensor  # (n, d)
    text: Tensor  # (n, d)
    scale: Tensor  # ()
    bias: Tensor  # ()
    image_negatives: Tensor | None  # (k, d)
    text_negatives: Tensor | None  # (k, d)
    negatives: Negatives | None
    weights: Tensor | None  # (n,)
    groups: targets.Groups | None
    attract: bool  # pairs of one group are positives
    shards: Shards | None
    strategy: str
    backend: str

    def positives(self) -> Tensor:
        """-> (n,): the logits of the pairs."""
        return self.scale * (promote(self.image) * promote(self.text)).sum(1) + self.bias

    def losses(self, positives: Tensor) -> Tensor:
        """-> (n,): of each pair, half of its row and of its column, times its weight."""
        losses = self._sums(self.image, self.text) / 2 + softplus(-positives)
        for anchors, queue in self._queues():
            rows, _ = dot_softplus_sums(
                anchors,
                queue,
                self.scale,
                self.bias,
                first_positive=queue.shape[0],
                need_cols=False,
                backend=self.backend,
            )
            losses = losses + rows
        if self.negatives is not None:
            more = self.image.new_zeros(self.image.shape[0], dtype=self.scale.dtype)
            for side in self._sides(self.negatives):
                more = more + self._sums(side, side) / 4  # every pair stands twice in the matrix of a side
            for rows in self._own(self.negatives):
                more = more + rows
            losses = losses + more
        return losses if self.weights is None else losses * self.weights

    def total(self, positives: Tensor, reduction: str) -> Tensor:
        """-> (): "mean" or "sum" of `losses`, in passes that make their gradients on the way."""
        c = targets.pair_weights(positives, self.weights, reduction, self.shards)
        weighted = self.weights is not None  # else all c are one number: it is enough to weigh the rows
        loss = self._total(self.image, self.text, *((c / 2, c / 2) if weighted else (c, None)))
        loss = loss + (c * softplus(-positives)).sum()
        for anchors, queue in self._queues():
            first = queue.shape[0]
            loss = loss + dot_softplus(
                anchors, queue, self.scale, self.bias, c, first_positive=first, backend=self.backend
            )
        if self.negatives is not None:
            more = c.new_zeros(())
            for side in self._sides(self.negatives):
                more = more + self._total(side, side, *((c / 4, c / 4) if weighted else (c / 2, None)))
            for rows in self._own(self.negatives):
                more = more + (c * rows).sum()
            loss = loss + more
        return loss

    def means(self, positives: Tensor) -> dict[str, Tensor]:
        """The mean logits of the positives and of all other pairs of the batch (NaN where there are none)."""
        x, y, shards = self.image, self.text, self.shards
        total, n = promote(y.detach()).sum(0), x.shape[0]
        if shards is not None:
            total, n = merge.vector_total(total, shards), shards.total
        sums = (self.scale * (promote(x) * total).sum(1) + n * self.bias - positives).detach()
        means = {"positive_logit": positives.detach(), "negative_logit": sums / (n - 1 if n > 1 else float("nan"))}
        return {name: t.mean() if shards is None else merge.mean(t, shards) for name, t in means.items()}

    # ------------------------------------------------------------------------------------------------ passes
    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """-> (n,): the sum of softplus over row i and column i of the logits of x and y."""
        if self.shards is None:
            rows, cols = dot_softplus_sums(x, y, self.scale, self.bias, **self._options())
        else:
            rows, cols = sharded_dot_softplus_sums(x, y, self.scale, self.bias, self.shards, **self._options())
        return rows + cols

    def _total(self, x: Tensor, y: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
        """u (n,), v (n,) or None for 0 -> (): sum_ij (u_i + v_j) softplus(l_ij) of x and y."""
        if self.shards is None:
            return dot_softplus(x, y, self.scale, self.bias, u, v, **self._options())
        options = self._options() | {"strategy": self.strategy}
        return sharded_dot_softplus(x, y, self.scale, self.bias, u, v, self.shards, **options)

    def _options(self) -> dict[str, Any]:
        groups = {} if self.groups is None else {"row_ids": self.groups.rows, "col_ids": self.groups.cols}
        return {"attract": self.attract, "backend": self.backend, **groups}

    # ------------------------------------------------------------------------------------------------ more pairs
    def _queues(self) -> Iterator[tuple[Tensor, Tensor]]:
        for anchors, queue in ((self.image, self.text_negatives), (self.text, self.image_negatives)):
            if queue is not None:
                yield anchors, queue

    def _sides(self, negatives: Negatives) -> Iterator[Tensor]:
        for name, side in (("image_to_image", self.image), ("text_to_text", self.text)):
            if name in negatives.directions:
                yield side

    def _own(self, negatives: Negatives) -> Iterator[Tensor]:
        """The sums over each anchor's own candidates, (n,)."""
        for anchors, candidates in ((self.image, negatives.texts), (self.text, negatives.images)):
            if candidates is not None:
                cosines = (promote(candidates) @ promote(anchors)[:, :, None]).squeeze(2)
                yield softplus(self.scale * cosines + self.bias).sum(1)
