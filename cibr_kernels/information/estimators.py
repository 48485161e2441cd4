"""Mutual information by a critic, and the conditional terms of CIBR.

    mine, dv, nwj, tuba, remine    functions of the critic's (J, L): `bounds.py`
    js, smile, infonce             functions of all scores: `contrast.py`
    club                           of a Gaussian model of Z given X: `gaussian.py`

    I(Z; own | other) for Z computed from `own` alone (Z - own - other is Markov), exactly
        markov  I(Z; own) - I(Z; other)          two critics, each of two inputs
        chain   I(Z; own, other) - I(Z; other)   when Z may depend on `other` as well
        joint   I(own; Z, other)                 the same up to I(own; other), which no encoder changes

A minibatch DV is biased upwards and is no lower bound; the difference of two is none in either direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cibr_kernels import checks
from cibr_kernels.distributed import merge
from cibr_kernels.distributed.shards import Agreement, Shards
from cibr_kernels.information import bounds
from cibr_kernels.information.bounds import BOUNDS, Ema, bound, check_ema, check_options
from cibr_kernels.information.contrast import CONTRASTS, contrast
from cibr_kernels.information.gaussian import align, ceb, club, gaussian_log_likelihood, variance
from cibr_kernels.information.moments import moments
from cibr_kernels.information.negatives import Negatives
from cibr_kernels.information.pairs import Pairs, agree

__all__ = [
    "BOUNDS",
    "DECOMPOSITIONS",
    "ESTIMATORS",
    "MAXIMISED",
    "UPPER",
    "Ema",
    "bound",
    "conditional_mutual_information",
    "gaussian_log_likelihood",
    "mutual_information",
]

MAXIMISED = (*BOUNDS, *CONTRASTS)  # what a critic maximises: the estimators that CIBR's game can be played with
ESTIMATORS = (*MAXIMISED, "club")
UPPER = ("ceb", "variance", "align")  # upper bounds of the conditional information, in closed form
DECOMPOSITIONS = ("markov", "chain", "joint")
UNITS = {"nats": 1.0, "bits": 1 / math.log(2)}


def mutual_information(
    x: Tensor,  # (n, dx)
    z: Tensor,  # (n, dz)
    critic: Any,
    *,
    estimator: str = "mine",
    negatives: Negatives = "all",
    diagonal: str = "exclude",
    marginals: Tensor | None = None,  # (q, dz)
    ema: Ema | None = None,
    unit: str = "nats",
    process_group: ProcessGroup | Shards | None = None,
    strategy: str = "gather",
    backend: str = "auto",
    **options: float,
) -> Tensor:
    """An estimate of I(X; Z) in nats or bits, a float32 scalar; differentiable in x, z, marginals and critic.

    critic, negatives, diagonal, marginals, process_group, strategy, backend: as in `critic_moments`.

    Estimators that the critic maximises:
        "mine", "dv", "nwj", "tuba" (a), "remine" (rho, c): functions of the critic's J and L, `bound`; `ema` is MINE's.
        "js": what a discriminator of pairs maximises.  Steady, unbiased and at most 0; no information in itself, but at
            its maximum the critic is log p(x, z) / p(x) p(z).  1606.00709, 1808.06670.
        "smile" (tau, 5): the gradient of "js", the value of "dv" with the marginal scores clamped to [-tau, tau]:
            biased down where the information is large, without the variance of e^T.  1910.06222.
        "infonce": the positive against its row's columns, at most log of their number: n + q, or k + 1 of k partners.
            The positive is in its own sum by definition, whatever `diagonal` says.  1807.03748.
    An estimator that it does not:
        "club": critic is a model q of z given x: x -> mean (n, dz), or (mean, log_std).  An upper bound when q is
            p(z|x), which it approaches by maximising `gaussian_log_likelihood`, and none before.  All pairs in O(n d);
            with the diagonal included it is the paper's formula, without it n / (n - 1) times that, unbiased.
            2006.12013.

    unit: of the result, "nats" or "bits".  options: those in parentheses, numbers.
    With all pairs the estimate can be trusted up to about log(0.3 n) nats; above log(n) - 1 its value says more about n
    than about I.
    With a `process_group`, n is the rows of all ranks and every rank gets the same estimate (an `nn.LogEMA` so moves
    alike on all of them).  A NaN or an infinity in the input gives NaN.
    Raises ValueError for unknown names and as `critic_moments`; TypeError for an option that the estimator lacks.
    """
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("unit", unit, tuple(UNITS))
    check_ema(estimator, ema)
    check_options(estimator, options)
    pairs = agree(
        "mutual_information",
        x,
        z,
        critic,
        negatives=negatives,
        diagonal=diagonal,
        marginals=marginals,
        process_group=process_group,
        strategy=strategy,
        backend=backend,
        one_argument=estimator == "club",
        ring=estimator not in ("smile", "club"),
        estimator=estimator,
    )
    with torch.autocast(pairs.x.device.type, enabled=False):
        value = estimate(pairs, estimator, ema, options)
    return value if unit == "nats" else value * UNITS[unit]


def estimate(pairs: Pairs, estimator: str, ema: Ema | None, options: dict[str, float]) -> Tensor:
    """-> nats, ().  No checks; outside of autocast."""
    if estimator in BOUNDS:
        j, el = moments(pairs)
        return bounds.value(j, el, estimator, ema=ema, **options)
    return club(pairs) if estimator == "club" else contrast(pairs, estimator, **options)


def conditional_mutual_information(
    z: Tensor,  # (n, dz)
    own: Tensor,  # (n, do)
    other: Tensor,  # (n, dt)
    critics: Any,
    *,
    estimator: str = "mine",
    decomposition: str = "markov",
    noise_std: float | None = None,
    negatives: Negatives = "all",
    diagonal: str = "exclude",
    ema: Sequence[Ema | None] = (None, None),
    unit: str = "nats",
    process_group: ProcessGroup | Shards | None = None,
    backend: str = "auto",
    **options: float,
) -> Tensor:
    """An estimate of I(Z; own | other) in nats or bits, the redundancy term of CIBR (2503.24182, equations 6 and 7).

    estimator: one that critics maximise, "mine" ... "infonce" of `mutual_information`: differences of estimates from
        `critics`, by `decomposition`:
        "markov": critics = (T1 on own and z, T2 on other and z)
        "chain":  critics = (T1 on [own, other] and z, T2 on other and z)
        "joint":  critics = (T1 on own and [z, other],) gives I(own; Z, other), or (T1, T2 on own and other) subtracts
                  I(own; other)
      A difference of two lower bounds is no bound ("js" is not even an information: train with it, report "smile").
      Both critics must be trained to *maximise* their own term: for one backward through encoder and critics use
      `cibr_loss`.
    estimator "ceb": an upper bound, E KL(N(z, s^2 I) || q(.|other)), in closed form; z is the encoder's mean, s is
        `noise_std`, and critics is a callable other -> mean (n, dz) or (mean, log_std), trained to *minimise* it.
    estimator "align": the same bound with q centred at the other encoder's z, passed as `other` (n, dz):
        |z - other|^2 / 2 s^2, equal to (1 - cos) / s^2 for unit vectors (2506.04870); critics is None.
    estimator "variance": an upper bound by two views.  `other` (n, dz) is the z of a second draw of `own` with the same
        condition: |z - other|^2 / 4 s^2, without bias the trace of Cov(Z | condition) / 2 s^2; critics is None.

    unit, process_group: as in `mutual_information`; every rank gets the same estimate.

    Raises ValueError for unknown names, shapes, a missing noise_std or a wrong number of critics; TypeError for dtypes.
    """
    facts = {"estimator": estimator, "decomposition": decomposition, "negatives": negatives, "diagonal": diagonal}
    with Agreement("conditional_mutual_information", process_group, noise_std=noise_std, **facts) as agreement:
        checks.choice("estimator", estimator, (*MAXIMISED, *UPPER))
        checks.choice("unit", unit, tuple(UNITS))
        for name, t in (("z", z), ("own", own), ("other", other)):
            checks.matrix(name, t)
        checks.same_rows(z=z, own=own, other=other)
        checks.one_precision(z=z, own=own, other=other)
        if estimator in UPPER and (noise_std is None or noise_std <= 0):
            raise ValueError(
                f"estimator {estimator!r} needs noise_std > 0 (without noise it is infinite), got {noise_std}"
            )
        if estimator in ("align", "variance"):
            checks.same_width(z=z, other=other)
        agreement.describe(z=z, own=own, other=other)
    if estimator in UPPER and noise_std is not None:
        with torch.autocast(z.device.type, enabled=False):
            if estimator == "ceb":
                upper = ceb(z, other, critics, noise_std)
            else:
                upper = (align if estimator == "align" else variance)(z, other, noise_std)
        value = upper.mean() if agreement.shards is None else merge.mean(upper, agreement.shards)
        return value if unit == "nats" else value * UNITS[unit]
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
        "unit": unit,
        **options,
    }
    terms = [
        mutual_information(x, y, critic, estimator=estimator, ema=e, backend=backend, **common)
        for (x, y), critic, e in zip(pairs, critics, ema, strict=False)
    ]
    return terms[0] - terms[1] if len(terms) == 2 else terms[0]
