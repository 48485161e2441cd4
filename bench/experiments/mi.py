"""Estimates of mutual information beside the truth, by one recipe, `python bench/ mi`.

Every number is DV over all pairs, J - L, of a critic (`mi_estimate`) trained on other samples than those it is read on,
at the last step.  The recipe is the same for every row.  Critic, learning rate and preprocessing were chosen on sparse
10x10, dense 40x40, spiral sparse 4x4, asinh student 4x4 and CCMI F with d_z = 50, at seed 100, none of which is
reported; batch, width and steps are as small as the time of a run asks.  Fixed data sets are split in half; each column
is mapped to normal scores by the ranks of the training half: monotone, so information cannot grow.

An estimate is trusted up to log(0.3 N) nats, N the rows of a training batch: beyond, the mean of e^T under the marginal
lies in pairs that a batch does not contain.  Rows past that ceiling are printed and nothing is demanded of them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from bench.experiments import mi_tasks
from bench.experiments.frame import Outcome, seeds
from bench.experiments.mi_estimate import RECIPE, STAIRCASE_RECIPE, Job, Reading, Recipe, estimate
from bench.experiments.mi_tasks import CCMI_WIDTHS, CHAINS, STAIRCASE, Group, Model

BMI = {  # benchmark-mi 0.1.3, run separately with its defaults (best checkpoint of its held-out half): seeds 0 and 1
    "sparse 3x3": {"bmi MINE": (0.975, 0.939), "bmi InfoNCE": (1.012, 1.006)},
    "sparse 5x5": {"bmi MINE": (0.955, 0.915), "bmi InfoNCE": (1.005, 0.972)},
    "sparse 25x25": {"bmi MINE": (0.842, 0.831)},
    "dense 5x5": {"bmi MINE": (0.600, 0.541)},
    "dense 25x25": {"bmi MINE": (1.233, 1.233)},
    "dense 50x50": {"bmi MINE": (1.483, 1.478)},
    "normal-cdf sparse 5x5": {"bmi MINE": (0.870, 0.821)},
    "half-cube sparse 5x5": {"bmi MINE": (0.956, 0.845)},
    "spiral sparse 5x5": {"bmi MINE": (0.353, 0.480)},
    "asinh student 5x5, dof 2": {"bmi MINE": (0.110, 0.023)},
}
CCMI = {  # the means that CCMI's authors log, 20,000 samples: difference of two classifiers, and of two f-MINEs
    "CCMI F, d_z = 20": {"CCMI MI-diff": (2.153,), "CCMI f-MINE": (2.089,)},
    "CCMI F, d_z = 100": {"CCMI MI-diff": (1.669,), "CCMI f-MINE": (-7.10,)},
    "CCMI G, d_z = 100": {"CCMI f-MINE": (0.067,)},
}
WITHIN_5 = ("sparse 3x3", "sparse 5x5", "dense 5x5", "dense 25x25", "dense 50x50")


@dataclass(frozen=True)
class Row:
    """One line: a sum of signed terms whose truth is known."""

    section: str
    label: str
    truth: float
    terms: tuple[tuple[int, Job], ...]  # (sign, job at seed 0)
    tolerance: float | None = None  # relative error that the mean over seeds may have
    peers: dict[str, tuple[float, ...]] = field(default_factory=dict)  # by name, estimates of their seeds
    ahead_of: str | None = None  # the peer that must be farther from the truth


@dataclass(frozen=True)
class Result:
    """A row with its held-out estimates, one per seed, in nats."""

    row: Row
    dv: tuple[float, ...]
    infonce: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.dv)

    def demands(self) -> list[tuple[bool, str]]:
        """(met, what was demanded) of everything that is demanded of this row."""
        row, error = self.row, abs(self.mean - self.row.truth)
        found = []
        if row.tolerance is not None:
            found.append((error <= row.tolerance * abs(row.truth), f"within {row.tolerance:.0%}"))
        if row.ahead_of is not None:
            theirs = abs(statistics.fmean(row.peers[row.ahead_of]) - row.truth)
            found.append((error < theirs, f"ahead of {row.ahead_of}"))
        return found


def rows() -> list[Row]:
    """Every line of the full table."""
    out = []
    for information in STAIRCASE:
        model = mi_tasks.gaussians(information)
        job = Job(model.name, ("x",), ("z",), 0, None, STAIRCASE_RECIPE)
        tolerance = trusted(0.05, information, STAIRCASE_RECIPE)
        out.append(Row("Gaussians, d = 20, fresh samples", f"I = {information:g}", information, ((1, job),), tolerance))
    for parameters in CHAINS:
        out += difference_rows(
            mi_tasks.chain(*parameters),
            10_000,
            ("I(z;xv)", "I(z;xt)", "I(xv;z,xt)", "I(xv;xt)"),
            [(("z",), ("xv",)), (("z",), ("xt",)), (("xv",), ("z", "xt")), (("xv",), ("xt",))],
            {"I(z;xv|xt) = I(z;xv) - I(z;xt)": (0, 1), "I(z;xv|xt) = I(xv;z,xt) - I(xv;xt)": (2, 3)},
        )
    for letter in "FG":
        for width in CCMI_WIDTHS:
            out += difference_rows(
                mi_tasks.ccmi(letter, width),
                20_000,
                ("I(x;y,z)", "I(x;z)"),
                [(("x",), ("y", "z")), (("x",), ("z",))],
                {"I(x;y|z) = I(x;y,z) - I(x;z)": (0, 1)},
            )
    for model in mi_tasks.bmi_models():
        job = Job(model.name, ("x",), ("z",), 0, 10_000)
        truth = model.information(job.left, job.right)
        tolerance = 0.05 if model.name in WITHIN_5 else None
        out.append(Row("bmi", model.name, truth, ((1, job),), tolerance, dict(BMI[model.name]), "bmi MINE"))
    return out


def trusted(tolerance: float, truth: float, recipe: Recipe = RECIPE) -> float | None:
    """The relative error allowed where the largest information on the way, `truth`, is one that batches can show."""
    return tolerance if 0 < truth <= recipe.ceiling else None


def difference_rows(
    model: Model,
    samples: int,
    names: Sequence[str],
    terms: Sequence[tuple[Group, Group]],
    differences: dict[str, tuple[int, int]],
) -> list[Row]:
    """The terms of a model, then differences of two of them, all to be within 10 %."""
    jobs = [Job(model.name, left, right, 0, samples) for left, right in terms]
    truths = [model.information(left, right) for left, right in terms]
    out = [
        Row(model.name, name, truth, ((1, job),), trusted(0.1, truth))
        for name, truth, job in zip(names, truths, jobs, strict=True)
    ]
    peers = CCMI.get(model.name, {})
    for name, (k, other) in differences.items():
        signed = ((1, jobs[k]), (-1, jobs[other]))
        tolerance = trusted(0.1, max(truths[k], truths[other]))
        truth, ahead = truths[k] - truths[other], next(iter(peers), None)
        out.append(Row(model.name, name, truth, signed, tolerance, dict(peers), ahead))
    return out


QUICK_SECTIONS = ("chain d = 5, r = 0.8, sigma = 1", "CCMI F, d_z = 20")
QUICK_LABELS = ("I = 2", "sparse 5x5", "dense 5x5", "spiral sparse 5x5")


def quick_rows() -> list[Row]:
    return [row for row in rows() if row.section in QUICK_SECTIONS or row.label in QUICK_LABELS]


def measure(table: Sequence[Row], seeds: Sequence[int], workers: int) -> tuple[list[Result], float]:
    """-> the rows with their estimates, and the seconds that all jobs took together."""
    from tqdm import tqdm

    def at(job: Job, seed: int) -> Job:
        return replace(job, seed=seed)

    jobs = list(dict.fromkeys(at(job, seed) for row in table for seed in seeds for _, job in row.terms))
    read: dict[Job, Reading] = {}
    with tqdm(total=len(jobs), unit="critic", leave=False, file=sys.stderr) as bar:
        if workers == 1:
            for job in jobs:
                read[job] = estimate(job)
                bar.update()
        else:
            context = multiprocessing.get_context("forkserver")
            with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
                futures = {pool.submit(estimate, job): job for job in jobs}
                for future in as_completed(futures):
                    read[futures[future]] = future.result()
                    bar.update()

    def total(row: Row, seed: int, column: str) -> float:
        return math.fsum(sign * getattr(read[at(job, seed)], column) for sign, job in row.terms)

    results = [
        Result(row, tuple(total(row, s, "dv") for s in seeds), tuple(total(row, s, "infonce") for s in seeds))
        for row in table
    ]
    return results, sum(reading.seconds for reading in read.values())


def text(results: Sequence[Result]) -> str:
    """The table, a block per section."""
    lines = []
    for section in dict.fromkeys(result.row.section for result in results):
        block = [result for result in results if result.row.section == section]
        peers = list(dict.fromkeys(name for result in block for name in result.row.peers))
        head = f"{'truth':>9}{'DV':>9}{'sd':>7}{'error':>9}{'InfoNCE':>9}" + "".join(f"{name:>14}" for name in peers)
        lines += ["", f"{section:<42}{head}   must be"]
        lines += [line(result, peers) for result in block]
    return "\n".join(lines)


def line(result: Result, peers: Sequence[str]) -> str:
    row = result.row
    sd = f"{statistics.stdev(result.dv):.3f}" if len(result.dv) > 1 else "-"
    error = f"{100 * (result.mean / row.truth - 1):+.1f} %" if row.truth else f"{result.mean:+.3f}"
    theirs = (f"{statistics.fmean(row.peers[name]):.3f}" if name in row.peers else "-" for name in peers)
    marks = ", ".join(f"{'PASS' if met else 'FAIL'} {demand}" for met, demand in result.demands())
    return (
        f"  {row.label:<40}{row.truth:>9.4f}{result.mean:>9.3f}{sd:>7}{error:>9}"
        f"{statistics.fmean(result.infonce):>9.3f}" + "".join(f"{value:>14}" for value in theirs) + f"   {marks or '-'}"
    )


def plot(path: Path, results: Sequence[Result]) -> None:
    """Estimate against truth for Gaussians and for the differences; relative errors of the bmi tasks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    stairs, known, bmi = figure.subplots(1, 3)
    block = [r for r in results if r.row.section.startswith("Gaussians")]
    truths = [r.row.truth for r in block]
    for label, values in (("DV", [r.dv for r in block]), ("InfoNCE, same critic", [r.infonce for r in block])):
        means = [statistics.fmean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        stairs.errorbar(truths, means, spread, fmt="o-", capsize=3, label=label)
    top = max([*truths, 1.0]) * 1.1
    stairs.plot([0, top], [0, top], "k:", linewidth=1)
    ceiling = STAIRCASE_RECIPE.ceiling
    stairs.axvspan(ceiling, max(top, ceiling), color="grey", alpha=0.15, label=f"beyond log(0.3 N) = {ceiling:.1f}")
    stairs.set(title="Gaussians, d = 20", xlabel="true I, nats", ylabel="held-out estimate, nats")
    stairs.legend()
    for section in dict.fromkeys(r.row.section for r in results if r.row.section.startswith(("chain", "CCMI"))):
        block = [r for r in results if r.row.section == section]
        known.plot([r.row.truth for r in block], [r.mean for r in block], "o", label=section, alpha=0.8)
    known.axline((0, 0), slope=1, color="black", linestyle=":", linewidth=1)
    known.set(title="information of the chain and CCMI models", xlabel="truth, nats", ylabel="held-out DV, nats")
    known.legend(fontsize="small")
    block = [r for r in results if r.row.section == "bmi"]
    for shift, (label, values) in enumerate(
        {
            "ours, last step": [r.dv for r in block],
            "bmi MINE, best step": [r.row.peers["bmi MINE"] for r in block],
        }.items()
    ):
        for k, (result, seen) in enumerate(zip(block, values, strict=True)):
            errors = [100 * (v / result.row.truth - 1) for v in seen]
            style = {"color": f"C{shift}", "label": label if k == 0 else None}
            bmi.plot(errors, [k + 0.2 * shift - 0.1] * len(errors), "o", **style)
    bmi.axvline(0, color="black", linestyle=":", linewidth=1)
    bmi.axvspan(-5, 5, color="green", alpha=0.1)
    bmi.set(title="bmi tasks, 10,000 samples", xlabel="error, % (a point per seed)")
    bmi.set_yticks(range(len(block)), [r.row.label for r in block])
    bmi.invert_yaxis()
    if block:
        bmi.legend()
    figure.savefig(path, dpi=110)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(quick: bool = False, workers: int | None = None) -> Outcome:
    """The table; missed where a demand of a row is."""
    began = time.perf_counter()
    table, used = quick_rows() if quick else rows(), seeds(quick)
    workers = workers or min(8, processors())
    results, busy = measure(table, used, workers)
    demanded = [all(met for met, _ in result.demands()) for result in results if result.demands()]
    missed = demanded.count(False)
    lines = [
        f"held-out information in nats, mean and sd over seeds {', '.join(map(str, used))}; last step of training",
        f"recipe of every row: {describe(RECIPE)}; half of the samples held out",
        f"recipe of fresh samples: {describe(STAIRCASE_RECIPE)}; read on {8 * STAIRCASE_RECIPE.batch} others",
        "columns as normal scores by ranks of the training half: information cannot grow by it",
        text(results),
        "\nbmi: benchmark-mi 0.1.3 run separately, seeds 0 and 1 at their best step; CCMI: means that its authors log",
        f"{missed} of {len(demanded)} rows with demands missed one; '-': nothing is demanded, as past the ceiling",
        f"{time.perf_counter() - began:.0f} s, {busy:.0f} s of work in {workers} processes",
    ]
    numbers = {
        "recipe": asdict(RECIPE),
        "fresh_recipe": asdict(STAIRCASE_RECIPE),
        "seeds": list(used),
        "rows": [asdict(result) for result in results],
    }
    return Outcome("\n".join(lines), numbers, not missed, lambda path: plot(path, results))


def describe(recipe: Recipe) -> str:
    made = f"Adam {recipe.lr:g}, hidden {recipe.hidden}, encoders {recipe.width}"
    return f"{recipe.steps} steps of N = {recipe.batch}, {made}, ceiling log(0.3 N) = {recipe.ceiling:.1f}"
