"""The table of a comparison, from the results of its runs: as numbers for `compare.json`, as Markdown to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cibr.compare.runs import POINTS, Task
from cibr.compare.spec import Spec
from cibr.compare.statistics import Counts, bootstrap, holm, paired

Results = dict[str, dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]]]  # configuration -> seed -> result, units


def load(tasks: Sequence[Task]) -> Results:
    """Of the runs that are over."""
    found: Results = {}
    for task in tasks:
        if (task.folder / "result.json").is_file():
            with np.load(task.folder / "units.npz") as units:
                arrays = {name: units[name] for name in units.files}
            result = json.loads((task.folder / "result.json").read_text())
            found.setdefault(task.configuration, {})[task.seed] = (result, arrays)
    return found


def compare(spec: Spec, results: Results) -> dict[str, Any]:
    """{"rows": [{"configuration", "metric", "point", "mean", "se", "seeds", "against", "difference", ...}], ...}.

    A method is compared with what it is `against` on the seeds that both have.  Holm's correction is over all methods
    and metrics at the step that validation chose; the last step is there to look at, not to test.
    """
    rows = [
        row
        for metric in spec.metrics
        for one in spec.configurations
        if one.name in results
        for point in POINTS
        if (row := row_of(one.name, one.against, metric, point, results)) is not None
    ]
    tested = [row for row in rows if "p" in row and row["point"] == POINTS[0]]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    seconds = {name: float(np.mean([r["seconds"]["training"] for r, _ in of.values()])) for name, of in results.items()}
    steps = {name: [r["steps"][POINTS[0]] for r, _ in of.values()] for name, of in results.items()}
    options = {one.name: one.options for one in spec.configurations}
    return {
        "baseline": spec.baseline,
        "metrics": list(spec.metrics),
        "base": spec.base,
        "options": options,
        "sets": spec.sets,
        "by_seed": spec.by_seed,
        "rows": rows,
        "cpu_seconds": seconds,
        "best_steps": steps,
    }


def row_of(name: str, against: str, metric: str, point: str, results: Results) -> dict[str, Any] | None:
    """None where no run has the metric."""
    have = {seed: r["scores"][point][metric] for seed, (r, _) in results[name].items() if metric in r["scores"][point]}
    if not have:
        return None
    values = list(have.values())
    row: dict[str, Any] = {"configuration": name, "metric": metric, "point": point, "seeds": len(values)}
    row |= {"mean": float(np.mean(values)), "se": standard_error(values), "against": against}
    both = [seed for seed in have if seed in results.get(against, {})]
    if name == against or not both:
        return row
    theirs = [results[against][seed][0]["scores"][point][metric] for seed in both]
    found = paired([have[seed] for seed in both], theirs)
    row |= {"difference": found.mean, "difference_se": found.se, "p": found.p, "pairs": len(both)}
    if f"hits {point} {metric}" in results[name][both[0]][1]:
        row["interval"] = bootstrap(
            *(counts([results[one][seed][1] for seed in both], point, metric) for one in (name, against))
        )
    return row


def counts(seeds: Sequence[Mapping[str, np.ndarray]], point: str, metric: str) -> Counts:
    """The seeds' units, put together in one pool by their names."""
    of = metric.partition("/")[0]
    pool = {unit: k for k, unit in enumerate(dict.fromkeys(u for one in seeds for u in one[f"units {of}"].tolist()))}
    hits, asked = (np.zeros((len(seeds), len(pool))) for _ in range(2))
    for s, one in enumerate(seeds):
        places = [pool[unit] for unit in one[f"units {of}"].tolist()]
        np.add.at(hits[s], places, one[f"hits {point} {metric}"])
        np.add.at(asked[s], places, one[f"asked {point} {metric}"])
    return Counts(hits, asked)


def standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def markdown(found: dict[str, Any]) -> str:
    """A table a metric; methods in the order of the file."""
    lines = []
    for metric in found["metrics"]:
        rows = [row for row in found["rows"] if row["metric"] == metric]
        primary = " (primary)" if metric == found["metrics"][0] else ""
        lines += [f"{metric}{primary}, per cent", ""]
        lines += ["| configuration | seeds | mean (SE) | difference (SE) | 95 % over units | p, Holm | last step |"]
        lines += ["|---|---|---|---|---|---|---|"]
        names = list(dict.fromkeys(row["configuration"] for row in rows))
        lines += [line_of([row for row in rows if row["configuration"] == name]) for name in names]
        lines += [""]
    took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["cpu_seconds"].items())
    lines += ["Differences are paired by seed. CPU seconds of training a run: " + took]
    return "\n".join(lines)


def line_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """One configuration's line, from its rows at the chosen and the last step."""
    best, last = (next((row for row in rows if row["point"] == point), {}) for point in POINTS)
    cells = [best["configuration"], str(best["seeds"]), number(best["mean"], best["se"])]
    if "difference" in best:
        versus = f" to {best['against']}"
        low, high = best.get("interval", (math.nan, math.nan))
        between = "" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"
        cells += [f"{number(best['difference'], best['difference_se'], sign=True)}{versus}", between, marked(best)]
    else:
        cells += ["", "", ""]
    gain = f", {last['difference']:+.1f} ({last['difference_se']:.1f})" if "difference" in last else ""
    return "| " + " | ".join([*cells, f"{last['mean']:.1f}{gain}"]) + " |"


def marked(row: Mapping[str, Any]) -> str:
    """Holm's p, with a star below .05."""
    p = row.get("p_holm", math.nan)
    return "" if math.isnan(p) else f"{p:.3f}{' *' if p < 0.05 else ''}"


def number(value: float, se: float, *, sign: bool = False) -> str:
    text = f"{value:+.1f}" if sign else f"{value:.1f}"
    return text if math.isnan(se) else f"{text} ({se:.1f})"
