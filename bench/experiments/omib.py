"""OMIB (2505.19996) where the best possible accuracy is known, `python bench/ omib`.

On the data of cibr/omib/sim.py: accuracy against beta swept through the bound M_u, OMIB beside its relatives at the
same seeds (the same data, batches and test rows), r over training, and what M_u is by each estimator of entropy.
Every method has the options that `python bench/ omib_choice` chose for it on other seeds, by validation; accuracies are
of test rows after the last step.  M_u here is the closed form's 1 / 3 H(v1, v2).
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.experiments.frame import Outcome
from bench.experiments.omib_choice import Setting, in_stacks, opened, options, upper
from bench.experiments.omib_stack import Stack
from cibr.errors import UsageError
from cibr.omib import beta_bounds, sim
from cibr.omib.entropy import entropies

ROWS, FEW = 10_000, 2_000  # to train on
SEEDS, QUICK_SEEDS = tuple(range(20, 40)), (20,)
FACTORS, FEW_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), (0.1, 1.0, 10.0)
SETTINGS = {  # by `python bench/ omib_choice`, as are the factors of M_u
    "fusion": Setting(hidden=16, lr=0.003, weight_decay=1.0),
    "branches": Setting(hidden=16, lr=0.003, weight_decay=1.0),
    "vib": Setting(hidden=16, lr=0.003, weight_decay=1.0),
    "fixed": Setting(hidden=16, lr=0.003, weight_decay=0.0),
    "omib": Setting(hidden=16, lr=0.003, weight_decay=1.0),
}
CHOSEN_FACTORS = {"vib": 10.0, "fixed": 0.3, "omib": 0.1}
TARGETS = {"I": 0.892, "III": 0.890}  # the paper's, of .909 and .908
BASELINES = ("fusion", "branches", "fixed")
EVERY = 50  # steps between two values of r
ENTROPY_ROWS = 2_000

Cell = tuple[str, int, str, float, int]


@dataclass(frozen=True)
class Trial:
    """One run; accuracies are shares of 1."""

    name: str  # of the data
    rows: int
    method: str
    factor: float  # beta / M_u
    seed: int
    test: float
    val: float
    kl: tuple[float, ...]  # nats of each bottleneck in the last step's batch
    r: tuple[float, ...]  # r_2 of a batch every EVERY steps of the main stage


def plan(seeds: Sequence[int]) -> list[Cell]:
    """Every run, without repetition."""
    cells = [(name, ROWS, "omib", factor) for name in TARGETS for factor in FACTORS]
    cells += [("III", FEW, "omib", factor) for factor in FEW_FACTORS] + [("II", ROWS, "omib", 1.0)]
    cells += [(name, ROWS, method, 1.0 if method == "fixed" else 0.0) for name in sim_two() for method in BASELINES]
    cells += [(name, ROWS, "vib", factor) for name in sim_two() for factor in (1.0, CHOSEN_FACTORS["vib"])]
    cells += [(name, ROWS, method, CHOSEN_FACTORS[method]) for name in sim_two() for method in ("omib", "fixed")]
    return [(*cell, seed) for seed in seeds for cell in dict.fromkeys(cells)]


def trials_of(cells: Sequence[Cell]) -> list[Trial]:
    """Trained and tested."""
    from tqdm import tqdm

    runs = {
        options(name, rows, method, SETTINGS[method], factor, seed): (name, rows, method, factor, seed)
        for name, rows, method, factor, seed in cells
    }
    found = []
    for group in tqdm(in_stacks(list(runs)), leave=False, file=sys.stderr):
        stack = Stack(group, opened)
        log = [parts for parts in stack.trained(EVERY) if "task_loss" in parts]
        measured = zip(stack.runs, stack.measured("test"), stack.measured("val"), strict=True)
        for k, (run, test, val) in enumerate(measured):
            kl = tuple(log[-1][f"kl_{i}"][k].item() for i in range(3) if f"kl_{i}" in log[-1])
            r = tuple(parts["r_1"][k].item() for parts in log if "r_1" in parts)
            found.append(Trial(*runs[run.options], test["accuracy"], val["accuracy"], kl, r))
    return found


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


def peak(trials: Sequence[Trial]) -> tuple[float, dict[float, tuple[float, float]]]:
    """The factor of the best mean, and for every factor the paired difference to M_u, mean and standard error."""
    factors = sorted({t.factor for t in trials})
    at = {f: {t.seed: t.test for t in trials if t.factor == f} for f in factors}
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trials = trials_of(plan(QUICK_SEEDS if quick else SEEDS))
        bounds = bounds_by_estimator()
    finally:
        torch.set_num_threads(threads)
    return outcome(trials, bounds, demanding=not quick)


def outcome(trials: Sequence[Trial], bounds: dict[str, float | str], *, demanding: bool = True) -> Outcome:
    """demanding: whether the targets count."""
    numbers = {
        "upper": {name: upper(name) for name in sim_two()},
        "bounds": bounds,
        "settings": {method: asdict(setting) for method, setting in SETTINGS.items()},
        "trials": [asdict(t) for t in trials],
    }
    met = not demanding or not missed(trials)
    return Outcome(table(trials, bounds), numbers, met, lambda path: plot(path, trials))


def missed(trials: Sequence[Trial]) -> list[str]:
    """Data whose target OMIB at M_u does not reach in the mean."""
    return [name for name, target in TARGETS.items() if tested(of(trials, name, ROWS, "omib", 1.0))[0] < target]


def tested(trials: Sequence[Trial]) -> tuple[float, float]:
    return mean_se([t.test for t in trials])


def table(trials: Sequence[Trial], bounds: dict[str, float | str]) -> str:
    seeds = sorted({t.seed for t in trials})
    lines = [
        f"OMIB-like data, test accuracy after the last step, %, mean ± standard error of {len(seeds)} seeds, from "
        f"{seeds[0]} to {seeds[-1]}"
    ]
    for method, s in SETTINGS.items():
        lines.append(f"  {method}: hidden {s.hidden}, lr {s.lr:g}, weight decay {s.weight_decay:g}")
    for name, rows in (*((n, ROWS) for n in TARGETS), ("III", FEW)):
        lines += ["", *_sweep(trials, name, rows)]
    lines += ["", f"methods, {ROWS} rows; differences paired by seed"]
    for name in sim_two():
        lines += _methods(trials, name)
    lines += ["", "r_2 over the main stage, mean of seeds at M_u (first, middle, last value)"]
    for name in sim_two():
        rs = _r(of(trials, name, ROWS, "omib", 1.0))
        lines.append(f"  SIM-{name}: {rs[0]:.2f}, {rs[len(rs) // 2]:.2f}, {rs[-1]:.2f}")
    lines += ["", "M_u of SIM-III by estimator, over the closed form's"]
    lines += [f"  {what:<32}{value if isinstance(value, str) else f'{value:.2f}'}" for what, value in bounds.items()]
    return "\n".join([*lines, "", *_targets(trials)])


def _sweep(trials: Sequence[Trial], name: str, rows: int) -> list[str]:
    swept = of(trials, name, rows, "omib")
    best, differences = peak(swept)
    lines = [f"SIM-{name}, {rows} rows, best possible {best_possible(name)}: beta / M_u, M_u = {upper(name):.5f}"]
    for factor in sorted({t.factor for t in swept}):
        own = [t for t in swept if t.factor == factor]
        beyond = f"   {_pm(*differences[factor], '+.2f')} against M_u" if factor in differences else ""
        kl = statistics.fmean(sum(t.kl) for t in own)
        mark = "   <- best" if factor == best else ""
        lines.append(f"{factor:>9g}  {_pm(*tested(own))}   KL {kl:>6.2f} nats{beyond}{mark}")
    return lines


def _methods(trials: Sequence[Trial], name: str) -> list[str]:
    """A line a method; a factor of beta that validation chose and that is M_u is not printed twice."""
    rivals = {"fusion": of(trials, name, ROWS, "fusion"), "branches": of(trials, name, ROWS, "branches")}
    for method in ("vib", "fixed", "omib"):
        for factor in dict.fromkeys((1.0, CHOSEN_FACTORS[method])):
            rivals[f"{method}, beta = {factor:g} M_u"] = of(trials, name, ROWS, method, factor)
    base = {t.seed: t.test for t in of(trials, name, ROWS, "omib", 1.0)}
    lines = [f"  SIM-{name}, best possible {best_possible(name)}"]
    for what, own in rivals.items():
        apart = mean_se([t.test - base[t.seed] for t in own])
        lines.append(f"    {what:<26}{_pm(*tested(own))}   {_pm(*apart, '+.2f')} against omib at M_u")
    return lines


def _targets(trials: Sequence[Trial]) -> list[str]:
    """What was demanded, and how far the mean is from it and from the best possible, in standard errors."""
    lines, wrong = [], missed(trials)
    for name, target in TARGETS.items():
        mean, error = tested(of(trials, name, ROWS, "omib", 1.0))
        lines.append(
            f"target SIM-{name}, the paper's {100 * target:.1f} at M_u: {_pm(mean, error)}, "
            f"{100 * (mean - target):+.2f} from the target, {100 * (mean - sim.named(name).bayes):+.2f} from the best "
            f"possible {best_possible(name)}: {'FAIL' if name in wrong else 'PASS'}"
        )
    return lines


def _r(trials: Sequence[Trial]) -> list[float]:
    return [statistics.fmean(column) for column in zip(*(t.r for t in trials), strict=True)]


def _pm(mean: float, error: float, spec: str = ".2f") -> str:
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
        means, errors = zip(*(mean_se([100 * t.test for t in cell]) for cell in cells), strict=True)
        accuracy.errorbar(
            factors, means, errors, marker="o", capsize=3, color=f"C{k}", label=f"SIM-{name}, {rows} rows"
        )
        if rows == ROWS:
            target = 100 * TARGETS[name]
            accuracy.axhline(target, color=f"C{k}", linewidth=1, linestyle="--", label=f"the paper's SIM-{name}")
        nats.plot(factors, [statistics.fmean(sum(t.kl) for t in cell) for cell in cells], "o-", color=f"C{k}")
    accuracy.axhline(90.8, color="black", linewidth=1, linestyle=":")
    accuracy.text(FACTORS[0], 90.9, "best possible", fontsize="small")
    accuracy.set(title=f"test accuracy, %, {len({t.seed for t in trials})} seeds", ylim=(79, 92))
    accuracy.legend(fontsize="small", loc="lower left")
    nats.set(title="sum of KL to N(0, I), nats", yscale="log")
    for axis in (accuracy, nats):
        axis.set(xscale="log", xlabel="beta / M_u")
        axis.axvline(1, color="gray", linewidth=1)
    for k, name in enumerate(sim_two()):
        for t in (own := of(trials, name, ROWS, "omib", 1.0)):
            ratio.plot(range(1, len(t.r) + 1), t.r, color=f"C{k + 3}", alpha=0.25, linewidth=1)
        mean = _r(own)
        ratio.plot(range(1, len(mean) + 1), mean, color=f"C{k + 3}", linewidth=2, label=f"SIM-{name}")
    ratio.axhline(1, color="black", linewidth=1, linestyle=":")
    ratio.set(title="r of the second modality at M_u", xlabel=f"every {EVERY} steps", ylim=(0, 2))
    ratio.legend(fontsize="small")
    figure.savefig(path, dpi=110)
