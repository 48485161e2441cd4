"""How good is a penalty's gradient, and after how many steps of its critics: `python bench/ gradient`.

    s ~ N(0, I_8), p ~ N(0, I_32)                         what both modalities know, and what the image alone does
    x = R [tanh(U s); p]    y = tanh(W s)    z = f(s) + B p                          f a random network; E |z|^2 = 1
    I(Z + noise; X | Y):    d/dz_i = E (z~_i - E[Z | z~_i, y_i]) / sigma^2 = (B B^T + sigma^2 I)^-1 B p_i

The last line is exact: y determines s, and given it Z is N(f(s), B B^T).  Half of the power of z is B p.  z is frozen,
as if the encoder stood still while its critics learn: the best case.

Cosines are over all rows and entries of fresh batches, of an estimator's gradient with that oracle, both without the
part along z, which normalised embeddings cannot follow.  Two tables: of the gradient's mean over the noise (for
`variance` over the other views), which many steps add up to, and of one draw, which is what a step sees.  The mean is
of 16 draws, in two halves a and b: <a, b> is the square of its length without what is left of the noise.  ceb and
variance follow B p and not (B B^T + sigma^2 I)^-1 B p: they end below 1, at the cosine of the two.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cibr_kernels as ck
from bench.experiments.frame import Outcome, seeds
from cibr_kernels.information.moments import Shifts
from cibr_kernels.losses.scatter import variance_in_groups

SHARED, PRIVATE, X_SHARED, Y_DIM, Z_DIM = 8, 32, 32, 32, 64
X_DIM = X_SHARED + PRIVATE
SIGMA, BATCH, HIDDEN, LR = 0.25, 256, 128, 2e-3
STEPS, QUICK_STEPS = (30, 100, 300, 1000), (30, 100)
FRESH, DRAWS = 2, 16  # batches that a cosine is over, and draws of the noise for each


@dataclass(frozen=True)
class Batch:
    """x (n, 64), y (n, 32), z (n, 64) and the oracle's gradient (n, 64)."""

    x: Tensor
    y: Tensor
    z: Tensor
    oracle: Tensor


class Source:
    """Batches of one random world."""

    def __init__(self) -> None:
        self.u, self.w = torch.randn(X_SHARED, SHARED), torch.randn(Y_DIM, SHARED)
        self.rotation = torch.linalg.qr(torch.randn(X_DIM, X_DIM))[0]
        self.inner, self.outer = torch.randn(64, SHARED) / 2, torch.randn(Z_DIM, 64)
        mean_square = self.features(torch.randn(4096, SHARED)).square().sum(1).mean()
        self.outer = self.outer / (2 * mean_square).sqrt()
        b = torch.randn(Z_DIM, PRIVATE)
        self.b = b / b.norm() / math.sqrt(2)
        self.inverse = torch.linalg.inv(self.b @ self.b.T + SIGMA**2 * torch.eye(Z_DIM))

    def features(self, s: Tensor) -> Tensor:
        """f(s) (n, 64)."""
        return torch.tanh(s @ self.inner.T) @ self.outer.T

    def sample(self, n: int) -> Batch:
        return self.view(torch.randn(n, SHARED))

    def view(self, s: Tensor) -> Batch:
        """A draw of the private part for each s (n, 8)."""
        p = torch.randn(len(s), PRIVATE)
        x = torch.cat([torch.tanh(s @ self.u.T), p], 1) @ self.rotation.T
        private = p @ self.b.T
        return Batch(x, torch.tanh(s @ self.w.T), self.features(s) + private, private @ self.inverse)


# ------------------------------------------------------------------------------------------------ estimators
class Estimator(nn.Module):
    """`learn`: what its own parameters descend on, (); `value`: the penalty, () and differentiable in z."""

    def learn(self, batch: Batch) -> Tensor:
        return -self.value(batch, batch.z)

    def value(self, batch: Batch, z: Tensor) -> Tensor:
        raise NotImplementedError


class Critics(Estimator):
    """I(Z; X) - I(Z; Y), a critic each, as cibr_loss has them."""

    def __init__(self, estimator: str, negatives: str | Shifts = "all") -> None:
        super().__init__()
        self.estimator, self.negatives = estimator, negatives
        self.own, self.other = (ck.nn.ConcatCritic(width, Z_DIM, HIDDEN) for width in (X_DIM, Y_DIM))

    def terms(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor]:
        noisy = (z + SIGMA * torch.randn_like(z)) * math.sqrt(Z_DIM)
        return tuple(
            ck.mutual_information(x, noisy, critic, estimator=self.estimator, negatives=self.negatives)
            for x, critic in ((batch.x, self.own), (batch.y, self.other))
        )  # type: ignore[return-value]

    def learn(self, batch: Batch) -> Tensor:
        own, other = self.terms(batch, batch.z)
        return -own - other

    def value(self, batch: Batch, z: Tensor) -> Tensor:
        own, other = self.terms(batch, z)
        return own - other


class Ceb(Estimator):
    """A network learns E[z | y]."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = ck.nn.MeanNetwork(Y_DIM, Z_DIM, HIDDEN)

    def learn(self, batch: Batch) -> Tensor:
        return self.value(batch, batch.z)

    def value(self, batch: Batch, z: Tensor) -> Tensor:
        return ck.conditional_mutual_information(z, batch.x, batch.y, self.mean, estimator="ceb", noise_std=SIGMA)


class Denoiser(Estimator):
    """Score matching: a network learns E[Z | z~, y]; the gradient is (z~ - that) / sigma^2 by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ck.nn.MeanNetwork(Z_DIM + Y_DIM, Z_DIM, HIDDEN)

    def clean(self, noisy: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([noisy * math.sqrt(Z_DIM), y], 1))

    def learn(self, batch: Batch) -> Tensor:
        noisy = batch.z + SIGMA * torch.randn_like(batch.z)
        return (self.clean(noisy, batch.y) - batch.z).square().sum(1).mean() / (2 * SIGMA**2)

    def value(self, batch: Batch, z: Tensor) -> Tensor:
        noisy = z.detach() + SIGMA * torch.randn_like(z)
        score = (noisy - self.clean(noisy, batch.y)) / SIGMA**2
        return (score.detach() * z).sum(1).mean()


class Align(Estimator):
    """A text tower learns by CLIP beside the frozen z, and stands for E[z | y]."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(Y_DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, Z_DIM))

    def text(self, y: Tensor) -> Tensor:
        return F.normalize(self.tower(y), dim=1)

    def learn(self, batch: Batch) -> Tensor:
        return ck.clip_loss(F.normalize(batch.z, dim=1), self.text(batch.y), 1 / 0.07)

    def value(self, batch: Batch, z: Tensor) -> Tensor:
        text = self.text(batch.y).detach()
        return ck.conditional_mutual_information(z, batch.x, text, None, estimator="align", noise_std=SIGMA)


LEARNT: dict[str, Callable[[], Estimator]] = {
    "mine, all pairs": lambda: Critics("mine"),
    "mine, one shuffle": lambda: Critics("mine", ck.shifts(1)),
    "infonce": lambda: Critics("infonce"),
    "ceb": Ceb,
    "score matching": Denoiser,
    "align": Align,
}
VIEWS = {"variance, two views": 2, "variance, groups of 4": 4}  # nothing to learn
STYLES = {
    "mine, all pairs": "o-",
    "mine, one shuffle": "s:",
    "infonce": "^--",
    "ceb": "D-",
    "score matching": "v--",
    "align": "x-.",
    "variance, two views": "k-",
    "variance, groups of 4": "k--",
}


# ------------------------------------------------------------------------------------------------ the study
@dataclass(frozen=True)
class Cell:
    """The cosines of one estimator after so many steps of what it has to learn: of the mean, and of one draw."""

    estimator: str
    steps: int
    seed: int
    mean: float
    one_draw: float


def cosines(batches: Sequence[Batch], draws: Sequence[Tensor]) -> tuple[float, float]:
    """Of the gradients' mean over draws (k, n, 64) of each batch, and of the first draw, with the oracles.

    Over all rows and entries, without the part of each row along z.
    """

    def flat(rows: Tensor, z: Tensor) -> Tensor:
        return (rows - z * ((rows * z).sum(-1) / z.square().sum(1))[..., None]).flatten(-2)

    oracle = torch.cat([flat(batch.oracle, batch.z) for batch in batches])
    found = torch.cat([flat(k, batch.z) for k, batch in zip(draws, batches, strict=True)], 1)  # (k, entries)
    a, b = (half.mean(0) for half in found.chunk(2))
    length = (a @ b).clamp(min=1e-30).sqrt()
    return ((a + b) / 2 @ oracle / (length * oracle.norm())).item(), F.cosine_similarity(found[0], oracle, dim=0).item()


def gradients(batch: Batch, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a penalty at z (n, 64), for each draw of its noise: (DRAWS, n, 64)."""
    z = batch.z.clone().requires_grad_()
    return torch.stack([torch.autograd.grad(value(z), z)[0] for _ in range(DRAWS)])


def of_learnt(name: str, seed: int, checkpoints: Sequence[int]) -> list[Cell]:
    """One run of an estimator: its cosines after each number of steps, on batches that it has not seen."""
    torch.manual_seed(seed)
    source = Source()
    fresh = [source.sample(BATCH) for _ in range(FRESH)]
    estimator = LEARNT[name]()
    optimiser = torch.optim.Adam(estimator.parameters(), LR)
    cells = []
    for step in range(1, max(checkpoints) + 1):
        optimiser.zero_grad()
        estimator.learn(source.sample(BATCH)).backward()
        optimiser.step()
        if step in checkpoints:
            found = [gradients(batch, partial(estimator.value, batch)) for batch in fresh]
            cells.append(Cell(name, step, seed, *cosines(fresh, found)))
    return cells


def of_views(name: str, seed: int) -> Cell:
    """Of the scatter of so many views of each concept; a draw is one of the other views."""
    torch.manual_seed(seed)
    source, views = Source(), VIEWS[name]
    concepts = [torch.randn(BATCH, SHARED) for _ in range(FRESH)]
    batches = [source.view(s) for s in concepts]
    ids = torch.arange(BATCH).repeat(views)

    def value(s: Tensor, z: Tensor) -> Tensor:
        others = [source.view(s).z for _ in range(views - 1)]
        return variance_in_groups(torch.cat([z, *others]), ids, SIGMA, None)

    found = [gradients(batch, partial(value, s)) for batch, s in zip(batches, concepts, strict=True)]
    return Cell(name, 0, seed, *cosines(batches, found))


def study(used: Sequence[int], checkpoints: Sequence[int]) -> list[Cell]:
    from tqdm import tqdm

    cells = [of_views(name, seed) for name in VIEWS for seed in used]
    runs = [(name, seed) for name in LEARNT for seed in used]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    try:
        for name, seed in tqdm(runs, leave=False, file=sys.stderr):
            cells += of_learnt(name, seed, checkpoints)
    finally:
        torch.set_num_threads(threads)
    return cells


def average(cells: Sequence[Cell], estimator: str, steps: int, field: str = "mean") -> float:
    """Over seeds; of the views, which learn nothing, at any number of steps."""
    at = 0 if estimator in VIEWS else steps
    return statistics.fmean(getattr(c, field) for c in cells if c.estimator == estimator and c.steps == at)


def missed(cells: Sequence[Cell], checkpoints: Sequence[int]) -> list[str]:
    """What does not hold and must: all pairs above one shuffle, a regression above the adversary, after 100 steps."""
    order = ("mine, one shuffle", "mine, all pairs", "ceb")
    return [
        f"after {steps} steps {more} is not above {less}"
        for steps in checkpoints
        if steps >= 100
        for less, more in itertools.pairwise(order)
        if not average(cells, more, steps) > average(cells, less, steps)
    ]


def table(cells: Sequence[Cell], checkpoints: Sequence[int]) -> str:
    """A line an estimator: the mean's cosines at each checkpoint, then one draw's."""
    columns = "".join(f"{steps:>7}" for steps in checkpoints)
    lines = [
        f"{'':<24}{'mean over the noise':^{len(columns)}}   {'one draw':^{len(columns)}}",
        f"{'steps of what is learnt':<24}{columns}   {columns}",
    ]
    for name in (*LEARNT, *VIEWS):
        blocks = (
            "".join(f"{average(cells, name, steps, field):>7.2f}" for steps in checkpoints)
            for field in ("mean", "one_draw")
        )
        lines.append(f"{name:<24}{'   '.join(blocks)}")
    return "\n".join(lines)


def plot(path: Path, cells: Sequence[Cell], checkpoints: Sequence[int]) -> None:
    """Cosine against steps, a line an estimator, the spread over seeds as bars: of the mean, and of one draw."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, field, title in zip(
        panels,
        ("mean", "one_draw"),
        ("mean over the noise, what steps add up to", "one draw, what a step sees"),
        strict=True,
    ):
        for name in LEARNT:
            seen = [[getattr(c, field) for c in cells if (c.estimator, c.steps) == (name, n)] for n in checkpoints]
            spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in seen]
            values = [statistics.fmean(v) for v in seen]
            axis.errorbar(checkpoints, values, spread, fmt=STYLES[name], capsize=3, label=name)
        for name in VIEWS:
            axis.plot(checkpoints, [average(cells, name, 0, field)] * len(checkpoints), STYLES[name], label=name)
        axis.set(xscale="log", ylim=(0, 1.05), xlabel="steps of the critics or networks, z frozen", title=title)
        axis.set_xticks(checkpoints, [str(steps) for steps in checkpoints])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    panels[0].set_ylabel("cosine with the ideal penalty's gradient")
    panels[1].legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"gradient of I(Z; X given Y) at z: N = {BATCH}, noise_std = {SIGMA}", fontsize="medium")
    figure.savefig(path, dpi=110)


def run(quick: bool = False, checkpoints: Sequence[int] | None = None) -> Outcome:
    """Every estimator and seed."""
    checkpoints = checkpoints or (QUICK_STEPS if quick else STEPS)
    used = seeds(quick)
    began = time.process_time()
    cells = study(used, checkpoints)
    wrong = missed(cells, checkpoints)
    spent = time.process_time() - began
    lines = [
        f"cosine of the gradient at z with the ideal penalty's, mean over seeds {', '.join(map(str, used))}",
        f"N = {BATCH}, z {Z_DIM} wide, noise_std {SIGMA}, hidden {HIDDEN}, Adam {LR:g}; {spent:.0f} s of a processor",
        table(cells, checkpoints),
        "must hold from 100 steps on: one shuffle < all pairs < ceb: " + ("; ".join(wrong) or "PASS"),
    ]
    numbers = {"steps": list(checkpoints), "seeds": list(used), "cells": [asdict(cell) for cell in cells]}
    return Outcome("\n".join(lines), numbers, not wrong, lambda path: plot(path, cells, checkpoints))
