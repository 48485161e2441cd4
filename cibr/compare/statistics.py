"""What a difference between two methods is worth: paired over seeds, resampled over units, corrected for many looks.

A seed has its own split, and all methods see the same one, so methods are compared within seeds:

    d_s = a_s - b_s,   mean d,   SE = sd(d) / sqrt(S),   p of Student's t with S - 1 degrees of freedom, two-sided

The seeds' test sets overlap: they are drawn from one pool of images or classes.  The bootstrap draws that pool anew and
recomputes every seed's score with the units' new weights, so a unit that is in ten test sets counts as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-9  # of per cents that are sums of float64


@dataclass(frozen=True)
class Paired:
    mean: float
    se: float  # NaN for one seed
    p: float  # NaN for one seed, and where all differences are the same


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """Of the scores of two methods (s,), seed by seed."""
    from scipy import stats

    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    mean, seeds = float(difference.mean()), len(difference)
    if seeds < 2:
        return Paired(mean, float("nan"), float("nan"))
    se = float(difference.std(ddof=1) / np.sqrt(seeds))
    if se <= ROUNDING * max(1.0, abs(mean)):  # equal differences: too coarse to tell noise by
        return Paired(mean, 0.0, 1.0 if abs(mean) <= ROUNDING else float("nan"))
    return Paired(mean, se, float(2 * stats.t.sf(abs(mean) / se, seeds - 1)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (1979): the k-th smallest of m times m - k + 1, never below the one before.

    NaN stays NaN, and is not counted.
    """
    values = np.asarray(p, float)
    known = np.flatnonzero(~np.isnan(values))
    adjusted, running = values.copy(), 0.0
    for k, place in enumerate(known[np.argsort(values[known], kind="stable")]):
        running = max(running, (len(known) - k) * values[place])
        adjusted[place] = min(1.0, running)
    return adjusted.tolist()


@dataclass(frozen=True)
class Counts:
    """What each seed's test set says of each unit of the pool: hits and questions, 0 where the unit is not in it."""

    hits: np.ndarray  # (s, u)
    asked: np.ndarray  # (s, u)

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Per cent (draws, s), where unit u counts `weights[:, u]` times; NaN where no unit is left."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return 100 * (weights @ self.hits.T) / (weights @ self.asked.T)


def bootstrap(ours: Counts, theirs: Counts, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 2.5 and 97.5 per cent points of the mean paired difference, when the pool's units are drawn anew."""
    units = ours.hits.shape[1]
    weights = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws).astype(float)
    difference = np.nanmean(ours.scores(weights) - theirs.scores(weights), axis=1)
    low, high = np.percentile(difference, [2.5, 97.5])
    return float(low), float(high)
