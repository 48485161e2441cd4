"""One held-out estimate of mutual information: a critic trained by all pairs, for `python bench/ mi`.

    T(x, z) = w . softplus(Wx x + f(x) + Wz z + g(z) + c) + c2        f, g: two-layer MLPs that start at zero

At the start it is `nn.ConcatCritic`, whose sums of ridge functions hold every Gaussian log-ratio; f and g add what is
curved.  It is additive over pairs, so all N^2 of them are one fused `mutual_information`; the encoders cost O(N).  ReLU
in place of softplus fits the training half better and the other half worse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

import cibr_kernels as ck
from bench.experiments import mi_tasks
from bench.experiments.mi_tasks import Group


@dataclass(frozen=True)
class Recipe:
    """How a critic is made and trained: Adam, its rate on a cosine from `lr` to 0."""

    hidden: int = 32  # of the additive layer: what a pair costs
    width: int = 128  # of the encoders
    batch: int = 256
    steps: int = 400
    lr: float = 3e-3

    @property
    def ceiling(self) -> float:
        """Nats up to which an estimate trained with these batches can be trusted."""
        return math.log(0.3 * self.batch)


RECIPE = Recipe()
STAIRCASE_RECIPE = Recipe(hidden=64, batch=512)  # fresh samples at every step; large batches for large information


class EncodedCritic(nn.Module):
    """`nn.ConcatCritic` whose two projections are each corrected by an MLP of their own side, at first by nothing."""

    def __init__(self, x_dim: int, z_dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.pairs = ck.nn.ConcatCritic(x_dim, z_dim, hidden, activation="softplus")
        self.encode_x, self.encode_z = (self._encoder(d, width, hidden) for d in (x_dim, z_dim))

    @staticmethod
    def _encoder(d: int, width: int, hidden: int) -> nn.Sequential:
        last = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(last.weight)
        return nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)

    def additive_parts(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, str, float]:
        """As `nn.ConcatCritic.additive_parts`: what `mutual_information` asks of a critic."""
        a, b, *rest = self.pairs.additive_parts(x, z)
        return (a + self.encode_x(x), b + self.encode_z(z), *rest)


class NormalScores:
    """Each column to standard normal quantiles by its rank among the rows it was made from, linear in between."""

    def __init__(self, train: Tensor) -> None:
        self.sorted = train.T.contiguous().sort(1).values  # (d, n)

    def __call__(self, t: Tensor) -> Tensor:
        """(m, d) -> (m, d); below the lowest and above the highest row it is constant."""
        n, columns = self.sorted.shape[1], t.T.contiguous()
        above = torch.searchsorted(self.sorted, columns).clamp(1, n - 1)
        low, high = self.sorted.gather(1, above - 1), self.sorted.gather(1, above)
        part = ((columns - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
        return torch.special.ndtri((above - 0.5 + part) / n).float().T.contiguous()


@dataclass(frozen=True)
class Job:
    """One critic: I(left; right) of a model by name, from `samples` rows, or from fresh rows where that is None."""

    model: str
    left: Group
    right: Group
    seed: int
    samples: int | None
    recipe: Recipe = RECIPE


@dataclass(frozen=True)
class Reading:
    """Held-out estimates in nats of one job."""

    dv: float
    infonce: float
    seconds: float


def estimate(job: Job) -> Reading:
    """Trains one critic and reads it on rows that it has not seen."""
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    model, generator = mi_tasks.models()[job.model], Generator().manual_seed(job.seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        rows = model.sample(n, generator)
        return torch.cat([rows[v] for v in job.left], 1), torch.cat([rows[v] for v in job.right], 1)

    def fresh() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(job.recipe.batch)

    if job.samples is None:
        x, z = draw(8 * job.recipe.batch)
        critic = train(fresh(), job.recipe)
    else:
        x, z = draw(job.samples)
        half = job.samples // 2
        x, z = (NormalScores(t[:half])(t) for t in (x, z))
        critic = train(shuffled(x[:half], z[:half], job.recipe.batch), job.recipe)
        x, z = x[half:], z[half:]
    with torch.no_grad():
        dv, infonce = (ck.mutual_information(x, z, critic, estimator=name).item() for name in ("dv", "infonce"))
    return Reading(dv, infonce, time.perf_counter() - began)


def shuffled(x: Tensor, z: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches of random rows, epoch after epoch."""
    batch = min(batch, len(x))
    while True:
        for rows in torch.randperm(len(x)).split(batch):
            if len(rows) == batch:
                yield x[rows], z[rows]


def train(batches: Iterator[tuple[Tensor, Tensor]], recipe: Recipe) -> EncodedCritic:
    """-> the critic after the last step."""
    x, z = next(batches)
    critic = EncodedCritic(x.shape[1], z.shape[1], recipe.hidden, recipe.width)
    optimiser = torch.optim.Adam(critic.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    for _ in range(recipe.steps):
        loss = -ck.mutual_information(x, z, critic, estimator="dv")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        x, z = next(batches)
    return critic
