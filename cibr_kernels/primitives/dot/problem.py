"""What the reductions of all dot products have in common: the features, and which pairs are special.

    l_ij = scale <x_i, y_j>        row i's positive is column first_positive + i

The registered operators are flat, because torch.library wants tensors and numbers.  Right behind them stands a problem,
the one argument that every backend takes, whatever it reduces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from torch import Tensor

P = TypeVar("P", bound="DotProblem")


@dataclass(frozen=True)
class DotProblem:
    """n rows against m columns."""

    x: Tensor  # (n, d)
    y: Tensor  # (m, d)
    scale: Tensor  # ()
    row_ids: Tensor | None  # (n,) int64: pairs of one group
    col_ids: Tensor | None  # (m,) int64, there with row_ids
    first_positive: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, m, d."""
        return self.x.shape[0], self.y.shape[0], self.x.shape[1]

    @property
    def grouped(self) -> bool:
        return self.row_ids is not None

    def columns(self: P, left: int, right: int) -> P:
        """The same rows against columns [left, right)."""
        ids = None if self.col_ids is None else self.col_ids[left:right]
        return replace(self, y=self.y[left:right], col_ids=ids, first_positive=self.first_positive - left)


@dataclass(frozen=True)
class LseProblem(DotProblem):
    """Of `dot_lse`: pairs of one group take no part in the sums, nor do pairs above their row's limit; positives take
    none where they are masked."""

    mask_positives: bool
    row_limits: Tensor | None = None  # (n,), only where no sums of columns are asked for

    @property
    def chosen(self) -> bool:
        """Whether pairs besides the positives may take no part."""
        return self.grouped or self.row_limits is not None

    @property
    def transposed(self) -> LseProblem:
        """The same pairs with x and y in each other's place."""
        return replace(
            self, x=self.y, y=self.x, row_ids=self.col_ids, col_ids=self.row_ids, first_positive=-self.first_positive
        )


class LseSums(NamedTuple):
    """What the backward of `dot_lse` reads of its forward."""

    rows: Tensor  # (n,) log-sum-exp of each row
    cols: Tensor  # (m,) of each column, or (0,)
    positives: Tensor  # (n,)
    stash_shift: Tensor  # (): of the exponentials, NaN where there is no shift
    stash: Tensor  # exp(l - stash_shift) in the layout of the backend, or (0,)


class LseGradients(NamedTuple):
    """The gradients of the rows, columns and positives of `LseSums`."""

    rows: Tensor  # (n,)
    cols: Tensor  # (m,) or (0,)
    positives: Tensor  # (n,)


@dataclass(frozen=True)
class SoftplusProblem(DotProblem):
    """Of `dot_softplus`, l_ij + bias: positives take no part; other pairs of one group take none, or attract."""

    bias: Tensor  # ()
    attract: bool
