"""Estimates that are functions of a critic's (J, L).

DV      J - L                          MINE    DV, with L's gradient against a moving average of e^L
NWJ     J - e^(L - 1)                  TUBA    J - e^L / a - log a + 1
ReMINE  J - L - rho (L - c)^2
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from cibr_kernels import checks
from cibr_kernels.primitives.log_mean_exp.op import ema_corrected

BOUNDS = ("mine", "dv", "nwj", "tuba", "remine")
OPTIONS = {"tuba": ("a",), "remine": ("rho", "c"), "smile": ("tau",)}
Ema = Tensor | Callable[[Tensor], Tensor]


def bound(
    j: Tensor,
    el: Tensor,
    estimator: str = "mine",
    *,
    ema: Ema | None = None,
    a: float = math.e,
    rho: float = 0.1,
    c: float = 0.0,
) -> Tensor:
    """The estimate in nats from J and L (0-d), differentiable in both.

    `ema` (log of the moving average of e^L, 0-d, or an `nn.LogEMA`, which takes this L in first) belongs to "mine",
    without it "mine" is "dv"; `a` > 0 to "tuba" (e gives NWJ); `rho`, `c` to "remine" (2012.07494).
    J and L have one element each; so has ema, whatever its floating dtype.  An `nn.LogEMA` ignores the L of a J that
    is not finite.
    Raises ValueError for an unknown estimator, shapes, an ema with another estimator than "mine", or a <= 0; TypeError
    for dtypes, and for a, rho or c that are no numbers.
    Sources: Donsker-Varadhan and MINE 1801.04062, NWJ 0809.0853, TUBA 1905.06922.
    """
    checks.choice("estimator", estimator, BOUNDS)
    check_ema(estimator, ema)
    check_options(estimator, {"tuba": {"a": a}, "remine": {"rho": rho, "c": c}}.get(estimator, {}))
    if not isinstance(j, Tensor) or not isinstance(el, Tensor):
        raise TypeError(f"J and L must be tensors, got {type(j).__name__} and {type(el).__name__}")
    checks.one_precision(J=j, L=el)
    return value(checks.scalar("J", j, j), checks.scalar("L", el, j), estimator, ema=ema, a=a, rho=rho, c=c)


def value(
    j: Tensor,
    el: Tensor,
    estimator: str,
    *,
    ema: Ema | None = None,
    a: float = math.e,
    rho: float = 0.1,
    c: float = 0.0,
) -> Tensor:
    """`bound` of two 0-d tensors.  No checks but of what `ema` returns."""
    if estimator in ("mine", "dv"):
        if ema is None:
            return j - el
        # a J that is not finite tells of a batch whose L, too, is not to be remembered
        average = ema if isinstance(ema, Tensor) else ema(el + 0 * j.detach())
        return j - ema_corrected(el, checks.scalar("ema", average, el))
    if estimator == "nwj":
        return j - (el - 1).exp()
    if estimator == "tuba":
        return j - el.exp() / a - math.log(a) + 1
    return j - el - rho * (el - c) ** 2


def check_ema(estimator: str, ema: Ema | None) -> None:
    """Raises ValueError for an average beside another estimator than "mine", or of several numbers."""
    if ema is not None and estimator != "mine":
        raise ValueError(f"ema corrects the gradient of estimator 'mine' only, got estimator {estimator!r}")
    if isinstance(ema, Tensor) and ema.numel() != 1:
        raise ValueError(f"ema must have one element, got shape {tuple(ema.shape)}")


def check_options(estimator: str, options: dict[str, float]) -> None:
    """Raises TypeError for options that the estimator lacks or that are no numbers, ValueError for a or tau <= 0."""
    known = OPTIONS.get(estimator, ())
    for name, value in options.items():
        if name not in known:
            takes = f"the options {', '.join(known)}" if known else "no options"
            raise TypeError(f"estimator {estimator!r} takes {takes}, got {name}")
        checks.number(name, value)
        if name in ("a", "tau") and not value > 0:
            raise ValueError(f"{estimator.upper()}'s {name} must be positive, got {value}")
