"""OMIB (2505.19996) where the best possible accuracy is known, `python bench/ omib`.

On the data of cibr/omib/sim.py: accuracy against beta swept through the bound M_u, OMIB beside its relatives at the
same seeds (the same data, batches and test rows), r over training, and what M_u is by each estimator of entropy.
Accuracies are of the step that validation prefers, and of the last one.  M_u here is the closed form's 1 / 3 H(v1, v2).
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.experiments.frame import Outcome
from cibr.errors import UsageError
from cibr.omib import beta_bounds, sim, train
from cibr.omib.entropy import entropies
from cibr.omib.options import OmibOptions

ROWS, FEW = 10_000, 2_000  # to train on
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0,)
FACTORS, FEW_FACTORS, VIB_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), (0.1, 1.0, 10.0), (1.0, 3.0, 10.0)
SCHEDULE = {"warm_up_steps": 100, "steps": 400, "eval_every": 50, "test_rows": 10_000}
TARGETS = {"I": 0.892, "III": 0.890}  # the paper's, of .909 and .908
BASELINES = ("fusion", "branches", "fixed")
ENTROPY_ROWS = 2_000


@dataclass(frozen=True)
class Trial:
    """One run; accuracies are shares of 1."""

    name: str  # of the data
    rows: int
    method: str
    factor: float  # beta / M_u
    seed: int
    last: float  # test accuracy at the last step
    chosen: float  # at the step of the best validation accuracy
    val: float  # that validation accuracy
    kl: tuple[float, ...]  # nats of each bottleneck at the last step
    r: tuple[float, ...]  # r_2 at each validation


def upper(name: str) -> float:
    """M_u of the generator, exactly."""
    return beta_bounds(*sim.named(name).entropies()).upper


def trial(name: str, rows: int, method: str, factor: float, seed: int, **schedule: int) -> Trial:
    beta = factor * upper(name)
    words: dict[str, Any] = {**SCHEDULE, **schedule}
    words |= {"data": f"sim:{name}", "out": "-", "method": method, "beta": beta, "train_rows": rows, "seed": seed}
    run = train.start(OmibOptions(**words))
    train.advance(run)
    main = [entry for entry in run.log if "val" in entry]
    best = max(main, key=lambda entry: entry["val"]["accuracy"])
    kl = tuple(main[-1][f"kl_{i}"] for i in range(3) if f"kl_{i}" in main[-1])
    accuracies = (main[-1]["test"]["accuracy"], best["test"]["accuracy"], best["val"]["accuracy"])
    return Trial(name, rows, method, factor, seed, *accuracies, kl, tuple(e["r_1"] for e in main if "r_1" in e))


def plan(seeds: Sequence[int]) -> list[tuple[str, int, str, float, int]]:
    """Every run, without repetition."""
    cells = [(name, ROWS, "omib", factor) for name in TARGETS for factor in FACTORS]
    cells += [("III", FEW, "omib", factor) for factor in FEW_FACTORS] + [("II", ROWS, "omib", 1.0)]
    cells += [(name, ROWS, method, 1.0 if method == "fixed" else 0.0) for name in TARGETS for method in BASELINES]
    cells += [(name, ROWS, "vib", factor) for name in TARGETS for factor in VIB_FACTORS]
    cells += [("II", ROWS, "fusion", 0.0), ("II", ROWS, "vib", 1.0)]
    return [(*cell, seed) for seed in seeds for cell in cells]


def sim_two() -> list[str]:
    return [name for name, spec in sim.SPECS.items() if len(spec.own) == 2]


def best_possible(name: str) -> str:
    return f"{100 * sim.named(name).bayes:.1f}"


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; 0 for one value."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread


def of(trials: Sequence[Trial], name: str, rows: int, method: str, factor: float | None = None) -> list[Trial]:
    return [
        t
        for t in trials
        if (t.name, t.rows, t.method) == (name, rows, method) and (factor is None or t.factor == factor)
    ]


def by_validation(trials: Sequence[Trial]) -> list[Trial]:
    """Of each seed the trial whose beta validation prefers."""
    seeds = sorted({t.seed for t in trials})
    return [max((t for t in trials if t.seed == seed), key=lambda t: t.val) for seed in seeds]


def peak(trials: Sequence[Trial], value: Callable[[Trial], float]) -> tuple[float, dict[float, tuple[float, float]]]:
    """The factor of the best mean, and for every factor the paired difference to M_u, mean and standard error."""
    factors = sorted({t.factor for t in trials})
    at = {f: {t.seed: value(t) for t in trials if t.factor == f} for f in factors}
    differences = {f: mean_se([at[f][s] - at[1.0][s] for s in at[f]]) for f in factors if f != 1.0}
    return max(factors, key=lambda f: statistics.fmean(at[f].values())), differences


def bounds_by_estimator(rows: int = ENTROPY_ROWS, seed: int = 0) -> dict[str, float | str]:
    """M_u of SIM-III by each estimator, in units of the closed form's; then with every column ten times as large.

    MINE standardises its columns, so that it does not see their scale.
    """
    views = sim.draw(sim.named("III"), "class", train=rows, test=2, seed=seed).train.views
    found: dict[str, float | str] = {}
    cells = [(kind, scale) for scale in (1.0, 10.0, 0.1) for kind in ("gaussian", "knn")]
    for kind, scale in [*cells, ("mine_self", 1.0)]:
        what = f"{kind}, columns times {scale:g}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[what] = beta_bounds(*entropies([v * scale for v in views], kind, seed)).upper / upper("III")
            except UsageError as error:
                found[what] = str(error).partition(", and")[0]
    return found


def run(quick: bool = False) -> Outcome:
    """All trials, one thread."""
    from tqdm import tqdm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trials = [trial(*cell) for cell in tqdm(plan(QUICK_SEEDS if quick else SEEDS), leave=False, file=sys.stderr)]
        bounds = bounds_by_estimator()
    finally:
        torch.set_num_threads(threads)
    return outcome(trials, bounds, demanding=not quick)


def outcome(trials: Sequence[Trial], bounds: dict[str, float | str], *, demanding: bool = True) -> Outcome:
    """demanding: whether the targets count."""
    numbers = {
        "upper": {name: upper(name) for name in sim_two()},
        "bounds": bounds,
        "trials": [asdict(t) for t in trials],
    }
    met = not demanding or not missed(trials)
    return Outcome(table(trials, bounds), numbers, met, lambda path: plot(path, trials))


def missed(trials: Sequence[Trial]) -> list[str]:
    """Data whose target OMIB at M_u does not reach in the mean."""
    return [
        n for n, target in TARGETS.items() if mean_se([t.chosen for t in of(trials, n, ROWS, "omib", 1.0)])[0] < target
    ]


def table(trials: Sequence[Trial], bounds: dict[str, float | str]) -> str:
    seeds = len({t.seed for t in trials})
    lines = [
        f"OMIB-like data, test accuracy, %, mean ± standard error of {seeds} seeds: validation's choice (last step)"
    ]
    for name, rows in (*((n, ROWS) for n in TARGETS), ("III", FEW)):
        swept = of(trials, name, rows, "omib")
        best, differences = peak(swept, lambda t: t.chosen)
        lines += [
            "",
            f"SIM-{name}, {rows} rows, best possible {best_possible(name)}: beta / M_u, M_u = {upper(name):.5f}",
        ]
        for factor in sorted({t.factor for t in swept}):
            own = of(trials, name, rows, "omib", factor)
            beyond = f"{_pm(*differences[factor], '+.2f')} against M_u" if factor in differences else ""
            kl = statistics.fmean(sum(t.kl) for t in own)
            lines.append(
                f"{factor:>9g}  {_cell(own)}   KL {kl:>6.2f} nats   {beyond}{'   <- best' if factor == best else ''}"
            )
    lines += ["", f"methods, {ROWS} rows"]
    for name in sim_two():
        lines.append(f"  SIM-{name}, best possible {best_possible(name)}")
        rivals = {m: of(trials, name, ROWS, m) for m in BASELINES}
        rivals |= {
            "vib, beta = M_u": of(trials, name, ROWS, "vib", 1.0),
            "omib, beta = M_u": of(trials, name, ROWS, "omib", 1.0),
        }
        if name in TARGETS:
            rivals["vib, beta by validation"] = by_validation(of(trials, name, ROWS, "vib"))
            rivals["omib, beta by validation"] = by_validation(
                [t for t in of(trials, name, ROWS, "omib") if t.factor in VIB_FACTORS]
            )
        base = {t.seed: t.chosen for t in rivals["omib, beta = M_u"]}
        for what, own in ((what, own) for what, own in rivals.items() if own):
            apart = mean_se([t.chosen - base[t.seed] for t in own])
            lines.append(f"    {what:<26}{_cell(own)}   {_pm(*apart, '+.2f')} against omib")
    lines += ["", "r_2 over the main stage, mean of seeds at M_u (first, middle, last validation)"]
    for name in sim_two():
        rs = [
            statistics.fmean(column) for column in zip(*(t.r for t in of(trials, name, ROWS, "omib", 1.0)), strict=True)
        ]
        lines.append(f"  SIM-{name}: {rs[0]:.2f}, {rs[len(rs) // 2]:.2f}, {rs[-1]:.2f}")
    lines += ["", "M_u of SIM-III by estimator, over the closed form's"]
    lines += [f"  {what:<32}{value if isinstance(value, str) else f'{value:.2f}'}" for what, value in bounds.items()]
    wrong = missed(trials)
    for name, target in TARGETS.items():
        mean, error = mean_se([t.chosen for t in of(trials, name, ROWS, "omib", 1.0)])
        reached = (
            f"{100 * mean:.2f} ± {100 * error:.2f} of {best_possible(name)}, {'FAIL' if name in wrong else 'PASS'}"
        )
        lines.append(f"target SIM-{name}, the paper's {100 * target:.1f} at M_u: {reached}")
    return "\n".join(lines)


def _cell(trials: Sequence[Trial]) -> str:
    last = mean_se([t.last for t in trials])
    return f"{_pm(*mean_se([t.chosen for t in trials]))} ({100 * last[0]:.1f})"


def _pm(mean: float, error: float, spec: str = ".1f") -> str:
    return f"{100 * mean:{spec}} ± {100 * error:{'.2f'}}"


def plot(path: Path, trials: Sequence[Trial]) -> None:
    """Accuracy and nats against beta / M_u, and r over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    accuracy, nats, ratio = figure.subplots(1, 3)
    for k, (name, rows) in enumerate((*((n, ROWS) for n in TARGETS), ("III", FEW))):
        swept = of(trials, name, rows, "omib")
        factors = sorted({t.factor for t in swept})
        cells = [[t for t in swept if t.factor == f] for f in factors]
        means, errors = zip(*(mean_se([100 * t.chosen for t in cell]) for cell in cells), strict=True)
        accuracy.errorbar(
            factors, means, errors, marker="o", capsize=3, color=f"C{k}", label=f"SIM-{name}, {rows} rows"
        )
        accuracy.plot(
            factors, [mean_se([100 * t.last for t in cell])[0] for cell in cells], "--", color=f"C{k}", alpha=0.6
        )
        nats.plot(factors, [statistics.fmean(sum(t.kl) for t in cell) for cell in cells], "o-", color=f"C{k}")
    accuracy.axhline(90.8, color="black", linewidth=1, linestyle=":")
    accuracy.text(FACTORS[0], 90.9, "best possible", fontsize="small")
    accuracy.set(title="test accuracy, % (dashed: last step)", ylim=(79, 92))
    accuracy.legend(fontsize="small", loc="lower left")
    nats.set(title="sum of KL to N(0, I), nats", yscale="log")
    for axis in (accuracy, nats):
        axis.set(xscale="log", xlabel="beta / M_u")
        axis.axvline(1, color="gray", linewidth=1)
    for k, name in enumerate(sim_two()):
        for t in (own := of(trials, name, ROWS, "omib", 1.0)):
            ratio.plot(range(1, len(t.r) + 1), t.r, color=f"C{k + 3}", alpha=0.25, linewidth=1)
        mean = [statistics.fmean(column) for column in zip(*(t.r for t in own), strict=True)]
        ratio.plot(range(1, len(mean) + 1), mean, color=f"C{k + 3}", linewidth=2, label=f"SIM-{name}")
    ratio.axhline(1, color="black", linewidth=1, linestyle=":")
    ratio.set(title="r of the second modality at M_u", xlabel="validation, every 50 steps", ylim=(0, 2))
    ratio.legend(fontsize="small")
    figure.savefig(path, dpi=110)
