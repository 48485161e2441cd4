"""OMIB-like data: Gaussian views of a label, whose best possible accuracy is known.

    v_i = Q_i [a_0 + tau n; b_0 + tau n'; a_i; b_i]      Q_i a rotation; n, n' new in every view
    t = w_0 . a_0 + w_1 . a_1 + ... + s e                a: task-relevant, b: not; index 0: shared; |w|^2 = 1
    class  y = 1[t > 0]      value  y = t      anomaly  y = 1: the part of a along w is GROWTH times as long

    explained = share_0 / (1 + tau^2 / m) + share_1 + ...        share_i = |w_i|^2
    R^2 = explained / (1 + s^2)          of the best linear, hence best, prediction of t
    Bayes accuracy = 1 - acos(R) / pi    of one view alone: the same with m = 1 and its own shares

The paper's SIM-I has most of what the task needs in the first modality, SIM-II in the second, SIM-III in both alike;
its dimensions and its rule for the label are not in print, so ours are our own.  s is chosen for the Bayes accuracy.
The noise tau makes the joint entropy finite: views that share columns exactly have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cibr.errors import UsageError
from cibr.omib.data import Data, Split

GROWTH = 4.0
FULL_ENTROPY = math.log(2 * math.pi * math.e) / 2  # nats, of N(0, 1)


@dataclass(frozen=True)
class Spec:
    shared: float  # share_0
    own: tuple[float, ...]  # share_i of each view
    bayes: float  # accuracy of the best predictor of all views
    a0: int = 4  # numbers of columns
    b0: int = 4
    a: int = 8  # of each view
    b: int = 24
    tau: float = 0.3

    @property
    def width(self) -> int:
        return self.a0 + self.b0 + self.a + self.b

    def explained(self, views: Sequence[int] | None = None) -> float:
        """The variance of t, without s, that these views know; all by default."""
        seen = range(len(self.own)) if views is None else views
        return self.shared / (1 + self.tau**2 / len(seen)) + sum(self.own[i] for i in seen)

    @property
    def variance(self) -> float:
        """Of t: 1 + s^2."""
        return self.explained() / math.cos(math.pi * (1 - self.bayes)) ** 2

    def accuracy(self, views: Sequence[int] | None = None) -> float:
        """Of the best classifier that sees these views."""
        return 1 - math.acos(math.sqrt(self.explained(views) / self.variance)) / math.pi

    def entropies(self) -> tuple[list[float], float]:
        """Of each view, and their total correlation, in nats: exact.

        A shared column and its noisy copies: m variables of variance 1 + tau^2 and covariance 1, of determinant
        tau^2(m-1) (tau^2 + m).
        """
        m, common, v = len(self.own), self.a0 + self.b0, self.tau**2
        one = self.width * FULL_ENTROPY + common / 2 * math.log1p(v)
        shared = common / 2 * (m * math.log1p(v) - (m - 1) * math.log(v) - math.log(v + m))
        return [one] * m, shared


SPECS = {
    "I": Spec(0.2, (0.7, 0.1), 0.909),
    "II": Spec(0.2, (0.1, 0.7), 0.909),
    "III": Spec(0.2, (0.4, 0.4), 0.908),
    "III-3": Spec(0.25, (0.25, 0.25, 0.25), 0.908),
}


def named(name: str) -> Spec:
    """Raises UsageError for an unknown name."""
    if name not in SPECS:
        raise UsageError(f"--data sim:{name}; known are {', '.join(f'sim:{known}' for known in SPECS)}")
    return SPECS[name]


def draw(spec: Spec, task: str, *, train: int, test: int, seed: int) -> Data:
    """`train` rows, `test` for validation and `test` more; the same for the same seed.

    Training rows of an anomaly task are half anomalies, which the caller leaves out.
    """
    excess = spec.variance - 1
    if excess < 0:
        most = 1 - math.acos(math.sqrt(spec.explained())) / math.pi
        raise UsageError(f"the Bayes accuracy cannot be {spec.bayes}: without any noise s it is {most:.4f}")
    generator = torch.Generator().manual_seed(seed)
    m = len(spec.own)
    turns = [torch.linalg.qr(torch.randn(spec.width, spec.width, generator=generator))[0] for _ in range(m)]
    first, val, last = (_rows(spec, turns, math.sqrt(excess), task, n, generator) for n in (train, test, test))
    return Data(first, val, last, ceiling=ceiling(spec, task))


def ceiling(spec: Spec, task: str) -> dict[str, float]:
    """For anomalies: of one who sees w . a itself, P(|N(0, GROWTH^2)| > |N(0, 1)|) = 2/pi atan(GROWTH)."""
    if task == "class":
        return {"accuracy": spec.bayes, **{f"accuracy_{i}": spec.accuracy([i]) for i in range(len(spec.own))}}
    return {"r2": spec.explained() / spec.variance} if task == "value" else {"auc": 2 / math.pi * math.atan(GROWTH)}


def _rows(spec: Spec, turns: Sequence[Tensor], s: float, task: str, n: int, generator: torch.Generator) -> Split:
    def normal(columns: int) -> Tensor:
        return torch.randn(n, columns, generator=generator)

    shares = (spec.shared, *spec.own)
    widths = (spec.a0, *[spec.a] * len(spec.own))
    w = torch.cat([torch.full((k,), math.sqrt(share / k)) for share, k in zip(shares, widths, strict=True)])
    a, b0, noise = normal(len(w)), normal(spec.b0), normal(1)[:, 0]
    odd = torch.randint(2, (n,), generator=generator)
    if task == "anomaly":
        a = a + (GROWTH - 1) * odd[:, None] * (a @ w / w.square().sum())[:, None] * w
    a0, *own = a.split(widths, 1)
    views = []
    for a_i, turn in zip(own, turns, strict=True):
        columns = [a0 + spec.tau * normal(spec.a0), b0 + spec.tau * normal(spec.b0), a_i, normal(spec.b)]
        views.append(torch.cat(columns, 1) @ turn.T)
    t = a @ w + s * noise
    return Split(tuple(views), {"class": (t > 0).long(), "value": t, "anomaly": odd}[task])
