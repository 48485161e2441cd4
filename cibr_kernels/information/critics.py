"""What a critic has to offer, and the families that follow from it.

    additive_parts(x, z) -> a, b, w, bias, activation, slope    w . phi(a_i + b_j) + bias    nothing of n x m x h
    dot_parts(x, z) -> f, g                                     <f_i, g_j>                   nothing of n x m
    pair_parts(x, z) -> a, b   and   score_parts(a, b)          any function of two rows that broadcasts
    pairwise(x, z) -> (n, m)   and   paired(x, z) -> (n,)       any critic, panels of rows at a time
    critic(x, z) -> (n,)                                        the same, on rows that are repeated for every pair

The first that a critic has is used.  The last three are the slow path: a panel of p rows holds p m scores and whatever
the critic needs for so many pairs, once in the forward and once more, made again, in the backward.  p follows from
`stash_budget()` and `pair_width`, the numbers that a critic says it holds per pair (by default the widths of x and z).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cibr_kernels.primitives.additive.shifts.op import additive_shifts


@dataclass
class Additive:
    """left a (n, h), right b (m, h); S_ij = w . phi(a_i + b_j) + bias."""

    left: Tensor
    right: Tensor
    w: Tensor
    bias: Tensor
    activation: str
    slope: float
    backend: str
    random = False

    def shifted(self, k: int) -> Tensor:
        """-> (k, n): row r is the scores of rows i of left and (i + r) mod m of right."""
        options: dict[str, Any] = {"activation": self.activation, "slope": self.slope, "backend": self.backend}
        return additive_shifts(self.left, self.right, self.w, k, first=0, **options) + self.bias

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        """(p, h), (p, h) -> (p,)."""
        options: dict[str, Any] = {"activation": self.activation, "slope": self.slope, "backend": self.backend}
        return additive_shifts(left, right, self.w, 1, first=0, **options).squeeze(0) + self.bias


@dataclass
class Dot:
    """left f (n, k), right g (m, k); S_ij = <f_i, g_j>."""

    left: Tensor
    right: Tensor
    random = False

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        """(p, k), (p, k) -> (p,)."""
        return (left * right).sum(-1)


@dataclass
class General:
    """left (n, .), right (m, .) and two functions of rows; width: numbers held per pair; random: may draw numbers."""

    left: Tensor
    right: Tensor
    score: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], Tensor]
    width: int
    random: bool

    def paired(self, left: Tensor, right: Tensor) -> Tensor:
        """(p, .), (p, .) -> (p,)."""
        return _shaped(self.score(left, right), (left.shape[0],))

    def grid(self, left: Tensor, right: Tensor) -> Tensor:
        """(p, .), (m, .) -> (p, m)."""
        return _shaped(self.scores(left, right), (left.shape[0], right.shape[0]))


def family(critic: Any, x: Tensor, z: Tensor, backend: str) -> Additive | Dot | General:
    """The critic on x (n, dx) and z (m, dz), projected or embedded once.  Raises TypeError for what is no critic."""
    if hasattr(critic, "additive_parts"):
        a, b, w, bias, activation, slope = critic.additive_parts(x, z)
        return Additive(a, b, w, bias, activation, slope, backend)
    if hasattr(critic, "dot_parts"):
        return Dot(*critic.dot_parts(x, z))
    width = getattr(critic, "pair_width", x.shape[1] + z.shape[1])
    if hasattr(critic, "pair_parts"):
        a, b = critic.pair_parts(x, z)
        return General(
            a, b, critic.score_parts, lambda p, q: critic.score_parts(p[:, None], q[None]), width, random=False
        )
    paired = getattr(critic, "paired", critic)
    return General(x, z, paired, getattr(critic, "pairwise", _repeated(paired)), width, random=True)


def check(critic: Any, arguments: int) -> None:
    """Raises TypeError, before any work, for what is no critic, or cannot be called with so many arguments."""
    if arguments == 2 and any(
        hasattr(critic, name) for name in ("additive_parts", "dot_parts", "pair_parts", "paired", "pairwise")
    ):
        return
    if torch.compiler.is_compiling():
        return  # signatures cannot be traced
    try:
        inspect.signature(critic.forward if isinstance(critic, torch.nn.Module) else critic).bind(*(None,) * arguments)
    except (TypeError, ValueError):
        if arguments == 1:
            raise TypeError(f"the critic of 'club' must be callable with x alone, got {critic}") from None
        raise TypeError(
            "critic must have additive_parts, dot_parts, pairwise or paired (nn.ConcatCritic, nn.SeparableCritic), or "
            f"be callable with (x, z), got {critic}"
        ) from None


def _repeated(paired: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The scores of all pairs by a function of matching rows."""

    def scores(left: Tensor, right: Tensor) -> Tensor:
        p, m = left.shape[0], right.shape[0]
        rows = left[:, None].expand(p, m, -1).reshape(p * m, -1)
        columns = right[None].expand(p, m, -1).reshape(p * m, -1)
        return _shaped(paired(rows, columns), (p * m,)).view(p, m)

    return scores


def _shaped(scores: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(scores, Tensor):
        raise TypeError(f"the critic must return a tensor of shape {shape}, got {type(scores).__name__}")
    if scores.shape != shape:
        raise TypeError(f"the critic must return shape {shape}, got {tuple(scores.shape)}")
    return scores
