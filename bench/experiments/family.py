"""What each member of the family prices, beside the truth, where all is Gaussian: `python bench/ family`.

    x_v = [s; n_v]    x_t = [rho s + sqrt(1 - rho^2) e; n_t]        s, e of 4 columns; n of 4, in one view alone
    mu_v = [a s; b n_v],  4 a^2 = 1 - p,  4 b^2 = p                   p: the private share of the embedding's power
    z_v = mu_v + sigma noise;  mu_t, z_t likewise

In nats, of z = z_v (of z_t they are the same):

    truth      I(Z; Xv | Xt) = 2 log(1 + a^2 (1 - rho^2) / sigma^2) + 2 log(1 + b^2 / sigma^2)
    CEB        E KL(p(z | x_v) || q(z | x_t)), q any Gaussian: the truth at its minimum
    variance   the same with q's variance held at sigma^2: tr Cov(mu_v | x_t) / 2 sigma^2; CEB of the trainer
    align      q = p(z_t | x_t): E |mu_v - mu_t|^2 / 2 sigma^2 = (1 - E cos) / sigma^2 at unit power; MIB, 2506.04870
    VIB, OMIB  E KL(p(z | x_v) || N(0, I)) >= I(Z; Xv): it prices what is shared, too
    CIBR       MINE's I(Z; Xv) less MINE's I(Z; Xt): an estimate and no bound
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.experiments.frame import Outcome, seeds
from cibr.evaluate.information import information

EACH, RHO, SIGMA = 4, 0.95, 0.35  # columns shared, and private; as in bench/experiments/toy.py
PRIVATE, RHOS, AT = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9), (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), 0.2
MINE_AT, MINE_ROWS, MINE_STEPS = (0.0, 0.2, 0.5, 0.9), 4096, 300
NAMES = {
    "truth": "truth",
    "ceb": "CEB, any q",
    "variance": "variance, CEB with fixed noise",
    "align": "align, MIB",
    "prior": "VIB, OMIB: KL to N(0, I)",
    "own": "I(Z; Xv)",
}


@dataclass(frozen=True)
class Point:
    """Nats at one share p and correlation rho; mine: an estimate of a seed each."""

    p: float
    rho: float
    truth: float
    ceb: float
    variance: float
    align: float
    prior: float
    own: float
    mine: tuple[float, ...] = ()


def closed(p: float, rho: float, sigma: float = SIGMA) -> Point:
    a, b, v = (1 - p) / EACH, p / EACH, sigma**2  # squares
    left = 1 - rho**2
    truth = EACH / 2 * (math.log1p(a * left / v) + math.log1p(b / v))
    own = EACH / 2 * (math.log1p(a / v) + math.log1p(b / v))
    variance = EACH * (a * left + b) / (2 * v)
    align = EACH * (a * (2 - 2 * rho) + 2 * b) / (2 * v)
    width = 2 * EACH
    prior = (width * v + EACH * (a + b) - width - width * math.log(v)) / 2
    return Point(p, rho, truth, gaussian_ceb(p, rho, sigma), variance, align, prior, own)


def gaussian_ceb(p: float, rho: float, sigma: float) -> float:
    """E KL(p(z | x_v) || N(E[z | x_t], Cov[z | x_t])) from the three covariances, not from the formula above."""
    a, b = math.sqrt((1 - p) / EACH), math.sqrt(p / EACH)
    mu = torch.diag(torch.tensor([a] * EACH + [b] * EACH, dtype=torch.float64))  # of (s, n_v)
    left = torch.diag(torch.tensor([1 - rho**2] * EACH + [1.0] * EACH, dtype=torch.float64))  # Cov((s, n_v) | x_t)
    noise = sigma**2 * torch.eye(2 * EACH, dtype=torch.float64)
    apart = mu @ left @ mu.T  # of mu_v about E[z | x_t]
    q = apart + noise
    inverse = torch.linalg.inv(q)
    return ((torch.trace(inverse @ (noise + apart)) - 2 * EACH + torch.logdet(q) - torch.logdet(noise)) / 2).item()


def estimate(p: float, rho: float, seed: int) -> float:
    """MINE's difference, the mean of both views'."""
    generator = torch.Generator().manual_seed(seed)
    s, e, n_v, n_t = torch.randn(4, MINE_ROWS, EACH, generator=generator)
    t = rho * s + math.sqrt(1 - rho**2) * e
    a, b = math.sqrt((1 - p) / EACH), math.sqrt(p / EACH)
    views = [(torch.cat([shared, own], 1), torch.cat([a * shared, b * own], 1)) for shared, own in ((s, n_v), (t, n_t))]
    found = information(*views, noise_std=SIGMA, steps=MINE_STEPS, seed=seed)
    return (found["image_cmi"] + found["text_cmi"]) / 2


def run(quick: bool = False) -> Outcome:
    from tqdm import tqdm

    by_p, by_rho = [closed(p, RHO) for p in PRIVATE], [closed(AT, rho) for rho in RHOS]
    cells = [(p, seed) for p in MINE_AT for seed in seeds(quick)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        mine = {cell: estimate(cell[0], RHO, cell[1]) for cell in tqdm(cells, leave=False, file=sys.stderr)}
    finally:
        torch.set_num_threads(threads)
    by_p = [replace(point, mine=tuple(value for (p, _), value in mine.items() if p == point.p)) for point in by_p]
    wrong = missed([*by_p, *by_rho])
    numbers: dict[str, Any] = {"by_p": [asdict(point) for point in by_p], "by_rho": [asdict(point) for point in by_rho]}
    verdict = f"must hold: truth = CEB <= variance <= align, truth <= I(Z; Xv) <= KL: {'FAIL' if wrong else 'PASS'}"
    text = "\n".join([table(by_p, "p"), "", table(by_rho, "rho"), verdict, *wrong])
    return Outcome(text, numbers, not wrong, lambda path: plot(path, by_p, by_rho))


def missed(points: Sequence[Point], slack: float = 1e-9) -> list[str]:
    """Points at which a bound is none."""
    return [
        f"  p = {c.p:g}, rho = {c.rho:g}"
        for c in points
        if not (
            abs(c.ceb - c.truth) < slack
            and c.truth <= c.variance + slack
            and c.variance <= c.align + slack
            and c.truth <= c.own + slack
            and c.own <= c.prior + slack
        )
    ]


def table(points: Sequence[Point], key: str) -> str:
    fixed = f"rho = {RHO:g}" if key == "p" else f"p = {AT:g}"
    head = f"{key:>5}" + "".join(f"{name:>10}" for name in NAMES) + ("   MINE's difference" if key == "p" else "")
    lines = [f"nats, {fixed}, sigma = {SIGMA:g}", head]
    for point in points:
        values = asdict(point)
        mine = ""
        if point.mine:
            spread = f" ± {statistics.stdev(point.mine):.3f}" if len(point.mine) > 1 else ""
            mine = f"{statistics.fmean(point.mine):>14.3f}{spread}"
        lines.append(f"{values[key]:>5g}" + "".join(f"{values[name]:>10.3f}" for name in NAMES) + mine)
    return "\n".join(lines)


def plot(path: Path, by_p: Sequence[Point], by_rho: Sequence[Point]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = {
        "truth": ("black", 3.0, "-"),
        "ceb": ("C0", 1.5, "--"),
        "variance": ("C0", 1.5, "-"),
        "align": ("C2", 1.5, "-"),
        "prior": ("C3", 1.5, "-"),
        "own": ("C3", 1.5, ":"),
    }
    for axis, points, key in ((axes[0], by_p, "p"), (axes[1], by_rho, "rho")):
        x = [getattr(point, key) for point in points]
        for name, (colour, width, line) in styles.items():
            values = [getattr(point, name) for point in points]
            axis.plot(x, values, line, color=colour, linewidth=width, label=NAMES[name])
        axis.set(ylim=(0, None), ylabel="nats")
        axis.grid(alpha=0.3)
    dots = [(point.p, value) for point in by_p for value in point.mine]
    axes[0].plot(*zip(*dots, strict=True), "o", color="C1", markersize=5, label="CIBR: MINE's difference")
    axes[0].set(xlabel="p, private share of the embedding's power", title=f"correlation of the views {RHO:g}")
    axes[1].set(xlabel="rho, correlation of the shared factors", title=f"private share {AT:g}")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
