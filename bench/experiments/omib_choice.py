"""Which options of `omib` validation prefers, `python bench/ omib_choice`: what `python bench/ omib` then uses.

On seeds of its own, and on their validation rows; test rows are not read.  For each method the setting of GRID with the
best mean over both data sets at beta = M_u, and with that setting the best factor of FACTORS.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from bench.experiments.frame import Outcome
from bench.experiments.omib_stack import Stack
from cibr.omib import METHODS, beta_bounds, sim
from cibr.omib.data import Data, open_data
from cibr.omib.options import OmibOptions

SEEDS, QUICK_SEEDS, NAMES = (100, 101, 102), (100,), ("I", "III")
ROWS = 10_000
SCHEDULE = {"warm_up_steps": 100, "steps": 400, "test_rows": 10_000, "schedule": "cosine"}
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
AT_ONCE = 32  # runs of a stack


@dataclass(frozen=True, order=True)
class Setting:
    hidden: int
    lr: float
    weight_decay: float


GRID = tuple(Setting(*of) for of in itertools.product((16, 32, 64), (1e-3, 3e-3), (0.0, 1.0)))


@dataclass(frozen=True)
class Tried:
    """Validation of one configuration: the mean over data sets and seeds."""

    method: str
    setting: Setting
    factor: float  # beta / M_u
    accuracy: float  # a share of 1
    error: float  # its standard error over seeds
    loss: float  # nats


def upper(name: str) -> float:
    """M_u of the generator, exactly."""
    return beta_bounds(*sim.named(name).entropies()).upper


def options(name: str, rows: int, method: str, setting: Setting, factor: float, seed: int) -> OmibOptions:
    words: dict[str, Any] = {**SCHEDULE, **asdict(setting)}
    words |= {"data": f"sim:{name}", "out": "-", "method": method, "beta": factor * upper(name)}
    return OmibOptions(**words, train_rows=rows, seed=seed)


@cache
def _opened(data: str, task: str, train: int, test: int, seed: int) -> Data:
    return open_data(data, task, train=train, test=test, seed=seed)


def opened(of: OmibOptions) -> Data:
    return _opened(of.data, of.task, of.train_rows, of.test_rows, of.seed)


def in_stacks(runs: Sequence[OmibOptions]) -> list[list[OmibOptions]]:
    """Runs that can be stacked together, at most AT_ONCE."""

    def kind(of: OmibOptions) -> tuple[Any, ...]:
        return of.method, of.hidden, of.train_rows

    alike = (list(group) for _, group in itertools.groupby(sorted(runs, key=kind), kind))
    return [group[k : k + AT_ONCE] for group in alike for k in range(0, len(group), AT_ONCE)]


def validated(runs: Sequence[OmibOptions]) -> dict[OmibOptions, dict[str, float]]:
    """Trained, and read on validation rows."""
    from tqdm import tqdm

    found: dict[OmibOptions, dict[str, float]] = {}
    for group in tqdm(in_stacks(runs), leave=False, file=sys.stderr):
        stack = Stack(group, opened)
        stack.trained()
        found |= {run.options: told for run, told in zip(stack.runs, stack.measured("val"), strict=True)}
    return found


def tried(cells: Sequence[tuple[str, Setting, float]], seeds: Sequence[int]) -> list[Tried]:
    """Each (method, setting, factor) on both data sets and all seeds."""
    runs = {
        cell: [[options(name, ROWS, *cell, seed) for name in NAMES] for seed in seeds] for cell in dict.fromkeys(cells)
    }
    told = validated([run for of_cell in runs.values() for of_seed in of_cell for run in of_seed])
    found = []
    for cell, of_cell in runs.items():
        by_seed = [statistics.fmean(told[run]["accuracy"] for run in of_seed) for of_seed in of_cell]
        error = statistics.stdev(by_seed) / math.sqrt(len(by_seed)) if len(by_seed) > 1 else 0.0
        loss = statistics.fmean(told[run]["task_loss"] for of_seed in of_cell for run in of_seed)
        found.append(Tried(*cell, statistics.fmean(by_seed), error, loss))
    return found


def best(found: Sequence[Tried], method: str) -> Tried:
    return max((t for t in found if t.method == method), key=lambda t: t.accuracy)


def run(quick: bool = False) -> Outcome:
    """The grid, then beta; one thread."""
    threads, seeds = torch.get_num_threads(), QUICK_SEEDS if quick else SEEDS
    torch.set_num_threads(1)
    try:
        grid = tried([(method, setting, 1.0) for method in METHODS for setting in GRID], seeds)
        settings = {method: best(grid, method).setting for method in METHODS}
        priced = [method for method, of in METHODS.items() if of.bottleneck != "none"]
        betas = tried([(method, settings[method], factor) for method in priced for factor in FACTORS], seeds)
    finally:
        torch.set_num_threads(threads)
    factors = {method: best(betas, method).factor for method in priced}
    numbers = {
        "settings": {method: asdict(setting) for method, setting in settings.items()},
        "factors": factors,
        "grid": [asdict(t) for t in grid],
        "betas": [asdict(t) for t in betas],
    }
    return Outcome(table(grid, betas, seeds), numbers)


def table(grid: Sequence[Tried], betas: Sequence[Tried], seeds: Sequence[int]) -> str:
    names = " and ".join(f"SIM-{name}" for name in NAMES)
    lines = [f"validation accuracy, %, mean ± standard error over seeds {', '.join(map(str, seeds))}, of {names}"]
    for title, found in (("settings, at beta = M_u", grid), ("beta / M_u, with the setting chosen", betas)):
        lines += ["", title]
        for t in found:
            of = f"hidden {t.setting.hidden}, lr {t.setting.lr:g}, weight decay {t.setting.weight_decay:g}"
            mark = "   <- chosen" if t == best(found, t.method) else ""
            lines.append(
                f"  {t.method:<9} {of:<40} {t.factor:>4g}   {100 * t.accuracy:.2f} ± {100 * t.error:.2f}"
                f"   loss {t.loss:.4f}{mark}"
            )
    return "\n".join(lines)
