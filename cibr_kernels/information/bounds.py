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
Ema = Tensor | Callable[[Tensor], Tensor]


def bound(
    j: Tensor, el: Tensor, estimator: str = "mine", *, ema: Ema | None = None, a: float = math.e, rho: float = 0.1,
    c: float = 0.0,
) -> Tensor:  # fmt: skip
    """The estimate in nats from J and L (0-d), differentiable in both.

    `ema` (log of the moving average of e^L, 0-d, or an `nn.LogEMA`, which takes this L in first) belongs to "mine",
    without it "mine" is "dv"; `a` > 0 to "tuba" (e gives NWJ); `rho`, `c` to "remine" (2012.07494).
    Raises ValueError for an unknown estimator, an ema with another estimator than "mine", or a <= 0.
    Sources: Donsker-Varadhan and MINE 1801.04062, NWJ 0809.0853, TUBA 1905.06922.
    """
    checks.choice("estimator", estimator, BOUNDS)
    check_ema(estimator, ema)
    if estimator in ("mine", "dv"):
        if ema is None:
            return j - el
        return j - ema_corrected(el, ema if isinstance(ema, Tensor) else ema(el))
    if estimator == "nwj":
        return j - (el - 1).exp()
    if estimator == "tuba":
        if a <= 0:
            raise ValueError(f"TUBA's a must be positive, got {a}")
        return j - el.exp() / a - math.log(a) + 1
    return j - el - rho * (el - c) ** 2


def check_ema(estimator: str, ema: Ema | None) -> None:
    """Raises ValueError for an average beside another estimator than "mine"."""
    if ema is not None and estimator != "mine":
        raise ValueError(f"ema corrects the gradient of estimator 'mine' only, got estimator {estimator!r}")
