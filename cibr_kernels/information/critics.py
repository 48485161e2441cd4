"""What a critic has to offer, and the families that follow from it.

    additive_parts(x, z) -> a, b, w, bias, activation, slope    w . phi(a_i + b_j) + bias    nothing of n x m x h
    dot_parts(x, z) -> f, g                                     <f_i, g_j>                   nothing of n x m
    pair_parts(x, z) -> a, b   and   score_parts(a, b)          any function of two rows that broadcasts
    pairwise(x, z) -> (n, m)   and   paired(x, z) -> (n,)       any critic, panels of rows at a time
    critic(x, z) -> (n,)                                        the same, on rows that are repeated for every pair

The first that shows all that a critic does is used: `view`.  The last three are the slow path: a panel of p rows holds
p m scores and whatever the critic needs for so many pairs, once in the forward and once more, made again, in the
backward.  p follows from `stash_budget()` and `pair_width`, the numbers that a critic says it holds per pair (by
default the widths of x and z).  Scores are used in float32 (float64) whatever the dtype of a critic's parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cibr_kernels.information.wrappers import dtype_for, hooked, in_its_dtype, inside, opened, sharded, wrapped
from cibr_kernels.numerics import promote
from cibr_kernels.primitives.additive.shifts.op import additive_shifts

FUSED = ("additive_parts", "dot_parts")
FORMS = (*FUSED, "pair_parts", "pairwise", "paired")


class Weights(NamedTuple):
    """The parameters of a concat critic: a = x Wx^T, b = z Wz^T + c, S = bias + w . phi(a + b)."""

    wx: Tensor  # (h, dx)
    wz: Tensor  # (h, dz)
    c: Tensor  # (h,)
    w: Tensor  # (1, h)
    bias: Tensor  # (1,)


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
        return (promote(left) * promote(right)).sum(-1)


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
        return _scores_of(self.score(left, right), left.shape[0])

    def grid(self, left: Tensor, right: Tensor) -> Tensor:
        """(p, .), (m, .) -> (p, m)."""
        return _scores_of(self.scores(left, right), left.shape[0], right.shape[0])


@dataclass(frozen=True)
class View:
    """What estimators see of a critic: looked at once, by `view`."""

    called: Any  # what a call goes to
    inner: Any  # what has the methods: inside DDP, another
    form: str  # the first of FORMS that shows all that the critic does, or "call"
    known: bool  # whether it is one that says its form
    weights: Weights | None = None  # of a concat critic whose parameters are all there is to it

    def parts(self, x: Tensor, z: Tensor) -> Any:
        """What the method named by `form` gives."""
        if self.known and (self.called is not self.inner or self.form not in self.inner.overridden):
            return self.called(x, z, parts=self.form)
        return getattr(self.called, self.form)(x, z)

    def cast(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """For modules in half precision; critics that say their form cast by themselves."""
        return (x, z) if self.known else (in_its_dtype("x", x, self.inner), in_its_dtype("z", z, self.inner))

    def pair_width(self, x: Tensor, z: Tensor) -> int:
        """Numbers held per pair."""
        return getattr(self.inner, "pair_width", x.shape[1] + z.shape[1])


def view(critic: Any) -> View:
    """A module with hooks of its user's is only called, because nothing else would run them.

    A critic can say its form by an attribute `form`.  Then it looks after its hooks itself, forward(x, z, parts=form)
    gives its parts, `overridden` names methods that do not go through forward, x_dim and z_dim are widths or None.
    One whose parameters are all there is to it says so by `plain_weights`.
    """
    if wrapped(critic):
        critic = opened(critic)
        inner = inside(critic)
    else:
        inner = critic
        plain = None if torch.compiler.is_compiling() else getattr(critic, "plain_weights", None)
        weights = None if plain is None else plain()
        if weights is not None:
            return View(critic, critic, "additive_parts", True, Weights(*weights))
    said = getattr(inner, "form", None)
    if (said is None and hooked(inner)) or (inner is not critic and hooked(critic)):
        return View(critic, inner, "call", said is not None)
    return View(critic, inner, said or next((name for name in FORMS if hasattr(inner, name)), "call"), said is not None)


def family(critic: View, x: Tensor, z: Tensor, backend: str) -> Additive | Dot | General:
    """The critic on x (n, dx) and z (m, dz), projected or embedded once."""
    own, inner = critic.weights, critic.inner
    if own is not None and x.dtype == z.dtype == own.c.dtype:
        a, b = F.linear(x, own.wx), F.linear(z, own.wz, own.c)
        return Additive(a, b, own.w.view(-1), own.bias.view(()), inner.activation, inner.slope, backend)
    if not critic.known:
        x, z = critic.cast(x, z)
    if critic.form in FUSED:
        parts = critic.parts(x, z)
        if not critic.known or critic.inner.overridden:
            _check_parts(critic.form, parts, x.shape[0], z.shape[0])
        if critic.form == "dot_parts":
            return Dot(*parts)
        left, right, w, bias, activation, slope = parts
        return Additive(left, right, w, bias, activation, slope, backend)
    width = critic.pair_width(x, z)
    if critic.form == "pair_parts":
        (a, b), score = critic.parts(x, z), critic.inner.score_parts
        return General(a, b, score, lambda p, q: score(p[:, None], q[None]), width, random=False)
    paired = critic.called if critic.form == "call" else getattr(critic.inner, "paired", critic.called)
    scores = critic.inner.pairwise if critic.form == "pairwise" else _repeated(paired)
    return General(x, z, paired, scores, width, random=True)


def _check_parts(form: str, parts: tuple[Any, ...], n: int, m: int) -> None:
    """Raises TypeError for parts of other shapes than a form says."""
    if form == "additive_parts":
        a, b, w, bias, *_ = parts
        _shaped(form, (a, b, w, bias), ((n, w.shape[-1]), (m, w.shape[-1]), w.shape[-1:], ()))
    else:
        f, g = parts
        _shaped(form, (f, g), ((n, f.shape[-1]), (m, f.shape[-1])))


def check(
    critic: View,
    x: Tensor,
    z: Tensor,
    *,
    arguments: int = 2,
    names: tuple[str, str] = ("x", "z"),
    made: str = "the critic",
) -> None:
    """Raises, before any work, TypeError for what is no critic, cannot be called with so many arguments, or is float64
    beside features z that are not (or the reverse); ValueError for features of other widths than it was made for."""
    if (arguments == 1 or critic.form == "call") and not torch.compiler.is_compiling():  # signatures cannot be traced
        _check_callable(critic.called, arguments)
    if arguments == 2 and (critic.called is not critic.inner or critic.form not in FUSED):
        _check_wrapped(critic)
    if critic.known:
        for name, t, width in zip(names, (x, z), (critic.inner.x_dim, critic.inner.z_dim), strict=True):
            if width is not None and width != t.shape[1]:
                raise ValueError(f"{name} has width {t.shape[1]} but {made} was made for {width}")
    dtype_for(names[1], z, critic.inner)


def _check_callable(critic: Any, arguments: int) -> None:
    call = critic.forward if isinstance(critic, nn.Module) else critic
    try:
        if getattr(call, "__func__", None) is nn.Module.forward:
            raise TypeError("it has no forward")
        inspect.signature(call).bind(*(None,) * arguments)
    except (TypeError, ValueError):
        if arguments == 1:
            raise TypeError(f"the critic of 'club' must be callable with x alone, got {critic}") from None
        hint = ", whose hooks only a call would run" if hooked(critic) else ""
        raise TypeError(
            "critic must have additive_parts, dot_parts, pairwise or paired (nn.ConcatCritic, nn.SeparableCritic), or "
            f"be callable with (x, z), got {critic}{hint}"
        ) from None


def _check_wrapped(critic: View) -> None:
    """Raises TypeError where panels would call what has to be called once for each backward, on all ranks alike."""
    fused = critic.form in FUSED
    if critic.called is not critic.inner and not (critic.known and (fused or critic.form == "pair_parts")):
        raise TypeError(
            f"{type(critic.called).__name__} sees one call for each backward, but this critic is called in panels: "
            "wrap the module that holds the critic and the loss"
        )
    if critic.known and not fused and sharded(critic.inner):
        raise TypeError(
            "fully_shard gathers the weights at every call, and this critic is called in panels, as many as its rank "
            "has rows for: shard the module that holds the critic and the loss"
        )


def _repeated(paired: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The scores of all pairs by a function of matching rows."""

    def scores(left: Tensor, right: Tensor) -> Tensor:
        p, m = left.shape[0], right.shape[0]
        rows = left[:, None].expand(p, m, -1).reshape(p * m, -1)
        columns = right[None].expand(p, m, -1).reshape(p * m, -1)
        return _scores_of(paired(rows, columns), p * m).view(p, m)

    return scores


def _scores_of(scores: Any, *shape: int) -> Tensor:
    """Scores that have the shape, in float32 (float64)."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"the critic must return a tensor of shape {shape}, got {type(scores).__name__}")
    _shaped("the critic", (scores,), (shape,))
    return promote(scores)


def _shaped(name: str, tensors: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raises TypeError for other shapes, which broadcasting could hide."""
    found = tuple(map(attrgetter("shape"), tensors))
    if found != shapes:
        wanted, got = (", ".join(str(tuple(shape)) for shape in each) for each in (shapes, found))
        raise TypeError(f"{name} must return shape {wanted}, got {got}")
