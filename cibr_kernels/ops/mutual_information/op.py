"""Mutual information in nats as functions of a critic's (J, L), and the conditional terms of CIBR.

    DV      J - L                          MINE    DV, with L's gradient against a moving average of e^L
    NWJ     J - e^(L - 1)                  TUBA    J - e^L / a - log a + 1
    ReMINE  J - L - rho (L - c)^2

    I(Z; own | other) for Z computed from `own` alone (Z - own - other is Markov), exactly
        markov  I(Z; own) - I(Z; other)          two critics, each of two inputs
        chain   I(Z; own, other) - I(Z; other)   when Z may depend on `other` as well
        joint   I(own; Z, other)                 the same up to I(own; other), which no encoder changes

A minibatch DV is biased upwards and is no lower bound; the difference of two is none in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.ops import checks
from cibr_kernels.ops.critic_moments.op import Shifts, critic_moments
from cibr_kernels.ops.log_mean_exp.op import ema_corrected

BOUNDS = ("mine", "dv", "nwj", "tuba", "remine")
DECOMPOSITIONS = ("markov", "chain", "joint")
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
    if ema is not None and estimator != "mine":
        raise ValueError(f"ema corrects the gradient of estimator 'mine' only, got estimator {estimator!r}")
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


def mutual_information(
    x: Tensor,  # (n, dx)
    z: Tensor,  # (n, dz)
    critic: Any,
    *,
    estimator: str = "mine",
    negatives: str | Shifts = "all",
    diagonal: str = "exclude",
    ema: Ema | None = None,
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
    **options: float,
) -> Tensor:
    """An estimate of I(X; Z) in nats, a float32 scalar that the critic maximises; differentiable in x, z and critic.

    Args are those of `critic_moments` and `bound` (`options` are its a, rho and c).  With all pairs the estimate can be
    trusted up to about log(0.3 n) nats; above log(n) - 1 its value says more about n than about I.
    With a `process_group`, n is the rows of all ranks and every rank gets the same estimate (an `nn.LogEMA` so moves
    alike on all of them).
    """
    checks.choice("estimator", estimator, BOUNDS)
    j, el = critic_moments(
        x, z, critic, negatives=negatives, diagonal=diagonal, process_group=process_group, strategy=strategy,
        backend=backend,
    )  # fmt: skip
    return bound(j, el, estimator, ema=ema, **options)


def conditional_mutual_information(
    z: Tensor,  # (n, dz)
    own: Tensor,  # (n, do)
    other: Tensor,  # (n, dt)
    critics: Any,
    *,
    estimator: str = "mine",
    decomposition: str = "markov",
    noise_std: float | None = None,
    negatives: str | Shifts = "all",
    diagonal: str = "exclude",
    ema: Sequence[Ema | None] = (None, None),
    process_group: ProcessGroup | Shards | None = None,
    backend: str = "auto",
    **options: float,
) -> Tensor:
    """An estimate of I(Z; own | other) in nats, the redundancy term of CIBR (2503.24182, equations 6 and 7).

    estimator "mine", "dv", "nwj", "tuba", "remine": differences of bounds from `critics`, by `decomposition`:
        "markov": critics = (T1 on own and z, T2 on other and z)
        "chain":  critics = (T1 on [own, other] and z, T2 on other and z)
        "joint":  critics = (T1 on own and [z, other],) gives I(own; Z, other), or (T1, T2 on own and other) subtracts
                  I(own; other)
      A difference of two lower bounds is no bound.  Both critics must be trained to *maximise* their own term: for one
      backward through encoder and critics use `cibr_loss`.
    estimator "ceb": an upper bound, E KL(N(z, s^2 I) || q(.|other)), in closed form; z is the encoder's mean, s is
        `noise_std`, and critics is a callable other -> mean (n, dz) or (mean, log_std), trained to *minimise* it.
    estimator "align": the same bound with q centred at the other encoder's z, passed as `other` (n, dz):
        |z - other|^2 / 2 s^2, equal to (1 - cos) / s^2 for unit vectors (2506.04870); critics is None.

    process_group: as in `mutual_information`; every rank gets the same estimate.

    Raises ValueError for unknown names, shapes, a missing noise_std or a wrong number of critics.
    """
    facts = {"estimator": estimator, "decomposition": decomposition, "negatives": negatives, "diagonal": diagonal}
    with Agreement("conditional_mutual_information", process_group, noise_std=noise_std, **facts) as agreement:
        checks.choice("estimator", estimator, (*BOUNDS, "ceb", "align"))
        for name, t in (("z", z), ("own", own), ("other", other)):
            checks.matrix(name, t)
        checks.same_rows(z=z, own=own, other=other)
        if estimator in ("ceb", "align") and (noise_std is None or noise_std <= 0):
            raise ValueError(
                f"estimator {estimator!r} needs noise_std > 0 (without noise it is infinite), got {noise_std}"
            )
        if estimator == "align":
            checks.same_width(z=z, other=other)
        agreement.describe(z=z, own=own, other=other)
    if estimator in ("ceb", "align") and noise_std is not None:
        upper = _align(z, other, noise_std) if estimator == "align" else _ceb(z, other, critics, noise_std)
        return upper.mean() if agreement.shards is None else merge.mean(upper, agreement.shards)
    checks.choice("decomposition", decomposition, DECOMPOSITIONS)
    pairs = {
        "markov": ((own, z), (other, z)),
        "chain": ((torch.cat([own, other], 1) if decomposition == "chain" else own, z), (other, z)),
        "joint": ((own, torch.cat([z, other], 1) if decomposition == "joint" else z), (own, other)),
    }[decomposition]
    if len(critics) != 2 and not (decomposition == "joint" and len(critics) == 1):
        raise ValueError(f"decomposition {decomposition!r} needs 2 critics, got {len(critics)}")
    common: dict[str, Any] = {
        "negatives": negatives,
        "diagonal": diagonal,
        "process_group": agreement.shards,
        **options,
    }
    terms = [
        mutual_information(x, y, critic, estimator=estimator, ema=e, backend=backend, **common)
        for (x, y), critic, e in zip(pairs, critics, ema, strict=False)
    ]
    return terms[0] - terms[1] if len(terms) == 2 else terms[0]


def _promote(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _align(z: Tensor, other: Tensor, noise_std: float) -> Tensor:
    """-> (n,) nats."""
    return (_promote(z) - _promote(other)).square().sum(1) / (2 * noise_std**2)


def _ceb(z: Tensor, other: Tensor, q: Callable[[Tensor], Any], noise_std: float) -> Tensor:
    """-> (n,) nats."""
    out = q(other)
    mean, log_std = out if isinstance(out, tuple) else (out, torch.full_like(out, math.log(noise_std)))
    if mean.shape != z.shape:
        raise ValueError(f"q(other) has shape {tuple(mean.shape)} but z is {tuple(z.shape)}")
    variance = noise_std**2 + (_promote(z) - _promote(mean)).square()
    return (log_std - math.log(noise_std) + variance / (2 * torch.exp(2 * log_std)) - 0.5).sum(1)
