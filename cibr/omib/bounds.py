"""Between which weights of the bottleneck OMIB looks for its optimum.

    J = H1 + H2 - I12 = H(v1, v2)
    lower = 1 / 3 (H1 + H2)        upper = 1 / 3 J        upper_by_ratio = 1 / (1 + r) J

Of the two upper bounds, summaries of the first version print the one with r and those of the final one 1 / 3 J, which
is smaller, as r < 2.  With m modalities 3 becomes 2 m - 1 and 1 + r becomes 1 + r_2 + ... + r_m: our extension.

Entropies of continuous variables change with their units: multiplying d columns by c adds d log c nats, and so moves
these bounds, though nothing about the task has changed.  They may also be negative, and then there is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cibr.errors import UsageError


@dataclass(frozen=True)
class BetaBounds:
    lower: float  # M_l
    upper: float  # M_u without r
    upper_by_ratio: float | None  # M_u with r; None where no r was given


def omib_beta_bounds(h1: float, h2: float, i12: float, r: float | None = None) -> BetaBounds:
    """The bounds of beta for two modalities of entropies `h1`, `h2` and mutual information `i12`, all in nats.

    r: the weight of the second modality's KL.  Raises UsageError where a sum is not positive, where `i12` is negative
    and where r is not in (0, 2).
    """
    return beta_bounds((h1, h2), i12, None if r is None else (r,))


def beta_bounds(entropies: Sequence[float], shared: float, ratios: Sequence[float] | None = None) -> BetaBounds:
    """The same for m modalities; shared: their total correlation, the sum of entropies less the joint one.

    ratios: r_2 to r_m, of modality i against the first.  Raises UsageError as `omib_beta_bounds` does.
    """
    m, total = len(entropies), sum(entropies)
    if m < 2:
        raise UsageError(f"bounds of beta need two modalities or more, got {m}")
    if not all(map(math.isfinite, (*entropies, shared))):
        raise UsageError(f"entropies {list(entropies)} and shared information {shared} must be finite")
    if shared < 0:
        raise UsageError(f"the information that modalities share is {shared:g} nats, but cannot be negative")
    joint = total - shared
    if total <= 0 or joint <= 0:
        what, value = ("the sum of entropies", total) if total <= 0 else ("the joint entropy", joint)
        raise UsageError(
            f"{what} is {value:g} nats, and there are no bounds of beta unless it is positive: entropies of continuous "
            "variables may be negative and depend on their units; choose beta by validation"
        )
    if ratios is not None and (len(ratios) != m - 1 or not all(0 < r < 2 for r in ratios)):
        raise UsageError(f"r is {list(ratios)}, but must be {m - 1} number{'s' * (m > 2)} between 0 and 2")
    most = 2 * m - 1
    by_ratio = None if ratios is None else 1 / ((1 + sum(ratios)) * joint)
    return BetaBounds(1 / (most * total), 1 / (most * joint), by_ratio)
