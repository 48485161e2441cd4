"""Each claim of 2506.04870 beside what `python bench/ alignment` saw: reproduced, not reproduced, or not testable.

A difference is paired by seed (and by depth or temperature where a claim is of all of them) and counts beyond two
standard errors; a correlation is Spearman's over runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

YES, PART, NO, UNTESTED = "reproduced", "reproduced in part", "not reproduced", "not testable here"
DEPTH_PAIR, LARGEST_BETA, PAPERS_BETA = (2, 6), 3.0, 0.1
CAPTIONS = (
    "needs COCO's 118,000 images with captions, BLIP-2's Q-Former on frozen EVA-CLIP features, a language model, some "
    "50,000 steps of 128 on GPUs, and CIDEr with its tokeniser"
)


@dataclass(frozen=True)
class Claim:
    text: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Measure:
    name: str
    of: Callable[[Any], float]


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def claims(trials: Sequence[Any]) -> list[Claim]:
    """`trials`: of bench/experiments/alignment.py."""
    plain = [t for t in trials if not t.learnt and t.beta == 0]
    standard = [t for t in trials if t.depth == 4 and t.first_tau == 0.07]
    learnt, fixed = ([t for t in standard if t.learnt == which] for which in (True, False))
    urr = Measure("URR", lambda t: t.nuisance)
    found = [
        falls("a deeper encoder leaves less nuisance (depth 6 against 2)", plain, "depth", DEPTH_PAIR, urr),
        falls("a higher temperature leaves less nuisance (1 against .07)", plain, "first_tau", (0.07, 1.0), urr),
        falls("beta removes nuisance, temperature fixed (3 against 0)", fixed, "beta", (0.0, LARGEST_BETA), urr),
        falls("beta removes nuisance, temperature learnt (3 against 0)", learnt, "beta", (0.0, LARGEST_BETA), urr),
        falls(
            "homeostasis: the learnt temperature falls as beta grows (3 against 0)",
            learnt,
            "beta",
            (0.0, LARGEST_BETA),
            Measure("tau", lambda t: t.tau),
        ),
        spared("entropy is kept", Measure("nats of spread", lambda t: t.entropy), learnt, fixed),
        spared("InfoNCE is kept", Measure("nats told", lambda t: t.told), learnt, fixed),
        falls(
            "the paper's best beta, .1, keeps what the task needs (temperature learnt)",
            learnt,
            "beta",
            (0.0, PAPERS_BETA),
            Measure("kept factors told, %", lambda t: t.kept),
            not_at_all=True,
        ),
    ]
    for name, key in (("biased CKA", "cka_biased"), ("debiased CKA", "cka_debiased"), ("mutual k-NN", "mutual_knn")):
        found.append(correlates(f"nuisance goes with low alignment by {name}", plain, (learnt, fixed), key))
    return [*found, Claim("CIDEr of captions rises from 91.7 to 93.0", UNTESTED, CAPTIONS)]


def falls(
    text: str,
    trials: Sequence[Any],
    key: str,
    levels: tuple[float, float],
    measure: Measure,
    *,
    not_at_all: bool = False,
) -> Claim:
    """That a measure falls from the first level of `key` to the second; `not_at_all`: that it does not."""
    before, after = ({pair(t, key): measure.of(t) for t in trials if getattr(t, key) == level} for level in levels)
    mean, error = mean_se([after[k] - before[k] for k in before])
    fell = mean < -2 * error
    means = f"{statistics.fmean(before.values()):.3g} -> {statistics.fmean(after.values()):.3g}"
    evidence = f"{measure.name} {means}, {mean:+.3g} ± {error:.2g}, {len(before)} pairs"
    return Claim(text, NO if fell == not_at_all else YES, evidence)


def pair(t: Any, key: str) -> tuple[Any, ...]:
    """What two runs of a paired difference share."""
    return tuple(getattr(t, name) for name in ("depth", "learnt", "first_tau", "beta", "seed") if name != key)


def spared(what: str, measure: Measure, learnt: Sequence[Any], fixed: Sequence[Any]) -> Claim:
    """That a measure falls less than half as much between beta 0 and 3 where the temperature is learnt.

    In part: less, beyond two standard errors, but more than half.
    """

    def lost(trials: Sequence[Any]) -> dict[int, float]:
        ends = [{t.seed: measure.of(t) for t in trials if t.beta == beta} for beta in (0.0, LARGEST_BETA)]
        return {seed: ends[0][seed] - ends[1][seed] for seed in ends[0]}

    with_learnt, with_fixed = lost(learnt), lost(fixed)
    mean, error = mean_se([with_fixed[s] - with_learnt[s] for s in with_fixed])
    means = [statistics.fmean(values.values()) for values in (with_learnt, with_fixed)]
    return Claim(
        f"homeostasis: {what} where the temperature is learnt, and lost where it is fixed",
        NO if mean <= 2 * error else YES if means[0] < means[1] / 2 else PART,
        f"{measure.name} lost from beta 0 to 3: {means[0]:.3g} learnt, {means[1]:.3g} fixed; {mean:+.3g} ± {error:.2g}",
    )


def correlates(text: str, plain: Sequence[Any], by_beta: Sequence[Sequence[Any]], key: str) -> Claim:
    """Over depths and temperatures the claim is made; over beta, temperature learnt and fixed, it is shown beside."""
    rho, *beside = (spearman([t.nuisance for t in ts], [getattr(t, key) for t in ts]) for ts in (plain, *by_beta))
    threshold = 2 / math.sqrt(len(plain) - 1) if len(plain) > 1 else 1.0
    evidence = (
        f"rank correlation {rho:+.2f} over {len(plain)} runs of depth and temperature; over beta {beside[0]:+.2f} with "
        f"the temperature learnt, {beside[1]:+.2f} with it fixed"
    )
    return Claim(text, YES if rho < -threshold else NO, evidence)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Of values without ties; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(range(len(values)), key=values.__getitem__)
        return [float(order.index(i)) for i in range(len(values))]

    a, b = ranks(x), ranks(y)
    return statistics.correlation(a, b) if len(a) > 1 else 0.0


def table(found: Sequence[Claim]) -> str:
    return "\n".join(["claims of 2506.04870", *(f"  {c.verdict.upper()}: {c.text}\n      {c.evidence}" for c in found)])
