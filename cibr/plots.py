"""Pictures of runs from what they logged: several objectives and seeds in one figure, mean and spread.

    curves.png    training and validation loss
    parts.png     contrastive loss, conditional information on an axis of its own, estimates beside log N
    recall.png    what was evaluated during training
    lambda.png    the last evaluation against the weight of the penalty
    final.png     the last evaluation as bars

Runs that differ in their seed alone are one line with a band. Pictures that need the model are in pictures.py.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cibr.errors import UsageError, missing_extra
from cibr.evaluate.report import TITLES
from cibr.run.journal import flat, read_log

# Okabe and Ito's colours in an order of falling darkness, so that a grey print keeps them apart; lines and marks do too
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7")
LINES = ("-", "--", "-.", ":")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")  # one more than colours, so that thirty bars differ
NOT_COMPARED = {"seed", "split_seed", "out", "threads", "device", "workers", "wandb"}
NOT_COMPARED |= {"save_every", "log_every", "eval_every", "keep"}
NAMES = {"lam": "λ", "batch_size": "batch", "noise_std": "noise σ", "hold_out": "held out:"}
PARTS = {
    "contrastive_loss": "contrastive loss (nats)",
    "image_cmi": "I(Zv; Xv | Xt), estimated (nats)",
    "text_cmi": "I(Zt; Xt | Xv), estimated (nats)",
}
ESTIMATES = {"image_own": "I(Zv; Xv)", "image_other": "I(Zv; Xt)", "text_own": "I(Zt; Xt)", "text_other": "I(Zt; Xv)"}
OTHERWISE = {  # where a run decomposes otherwise
    "chain": {"image_own": "I(Zv; Xv, Xt)", "text_own": "I(Zt; Xt, Xv)"},
    "joint": {
        "image_own": "I(Xv; Zv, Xt)",
        "image_other": "I(Xv; Xt)",
        "text_own": "I(Xt; Zt, Xv)",
        "text_other": "I(Xt; Xv)",
    },
}


@dataclass(frozen=True)
class Run:
    path: Path
    config: dict[str, Any]
    log: list[dict[str, float]]  # entries of training
    evaluations: list[dict[str, float]]  # during training; flat: "step", "loss", "zero_shot/NAME/top1", ...
    final: dict[str, float]  # RUN/evaluation.json, as `cibr evaluate --json` writes it, or the last one above

    def series(self, name: str, entries: list[dict[str, float]] | None = None) -> dict[int, float]:
        """step -> value, where the entries (by default of training) have it."""
        found = self.log if entries is None else entries
        return {int(entry["step"]): entry[name] for entry in found if name in entry}


def read_run(path: Path) -> Run:
    """Raises UsageError for what is no run or has logged nothing. A half-written last line is left out."""
    if not (path / "log.jsonl").is_file() or not (path / "config.json").is_file():
        raise UsageError(f"{path} holds no log.jsonl and config.json; it is not the folder of a run")
    entries = read_log(path / "log.jsonl")
    if not entries:
        raise UsageError(f"{path} has logged nothing yet")
    evaluations = [{"step": entry["step"], **flat(entry["eval"])} for entry in entries if "eval" in entry]
    final = evaluations[-1] if evaluations else {}
    if (path / "evaluation.json").is_file():
        final = flat(json.loads((path / "evaluation.json").read_text()))
    training = [entry for entry in entries if "eval" not in entry]
    return Run(path, json.loads((path / "config.json").read_text()), training, evaluations, final)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, and how they are drawn."""

    label: str
    runs: list[Run]
    style: int

    @property
    def line(self) -> dict[str, Any]:
        return {"color": COLOURS[self.style % len(COLOURS)], "linestyle": LINES[self.style % len(LINES)]}

    def values(self, name: str, *, evaluated: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Steps (s,) that all runs have, and values (runs, s) there."""
        series = [run.series(name, run.evaluations if evaluated else None) for run in self.runs]
        steps = sorted(set.intersection(*(set(one) for one in series)))
        return np.array(steps), np.array([[one[step] for step in steps] for one in series])

    def last(self, name: str) -> np.ndarray:
        """The final value of each run that has one."""
        return np.array([run.final[name] for run in self.runs if name in run.final])


def comparable(run: Run, runs: Sequence[Run], by_seed: Collection[str] = ()) -> dict[str, Any]:
    """The options that matter, of those that all runs of its objective have: one that came later was at its default."""
    alike = [set(other.config) for other in runs if other.config.get("objective") == run.config.get("objective")]
    return {
        name: value
        for name, value in run.config.items()
        if name in set.intersection(*alike) - {*NOT_COMPARED, *by_seed}
    }


def group_runs(runs: Sequence[Run], by_seed: Collection[str] = ()) -> list[Group]:
    """By all options but those that do not matter, and those that a comparison varies with the seed; labelled by the
    objective and by what tells the groups apart.
    """
    compared = [comparable(run, runs, by_seed) for run in runs]
    keys = [json.dumps(config, sort_keys=True) for config in compared]
    configs = dict(zip(keys, compared, strict=True))
    names = sorted({name for config in configs.values() for name in config} - {"objective"})
    differing = [n for n in names if len({json.dumps(c.get(n)) for c in configs.values() if n in c}) > 1]
    groups = []
    ordered = sorted(configs.items(), key=lambda item: (item[1].get("lam", 0.0), str(item[1].get("objective"))))
    for style, (key, config) in enumerate(ordered):
        details = [f"{NAMES.get(n, n.replace('_', ' '))} {config[n]}" for n in differing if n in config]
        label = ", ".join([str(config.get("objective", "run")), *details])
        groups.append(Group(label, [run for run, k in zip(runs, keys, strict=True) if k == key], style))
    return groups


def metric_name(name: str) -> str:
    """ "retrieval/flickr/text_to_image@1" -> "flickr: text to image R@1 (%)"."""
    *_, of, metric = name.split("/")
    known = {"top1": "top-1 (%)", "top5": "top-5 (%)", "mean_per_class": "mean per class (%)"}
    way, at, depth = metric.partition("@")
    of = TITLES.get(of, of)
    return f"{of}: " + (f"{way.replace('_', ' ')} R@{depth} (%)" if at else known.get(metric, metric.replace("_", " ")))


def headline(entries: Iterable[dict[str, float]]) -> list[str]:
    """The metrics worth a picture: of each set recall at 1 both ways; of one of classes top-1 in place of the first."""
    every = list(dict.fromkeys(name for entry in entries for name in entry if name.endswith(("/top1", "@1"))))
    classified = {name.split("/")[1] for name in every if name.endswith("/top1")}
    return [name for name in every if not (name.endswith("image_to_text@1") and name.split("/")[1] in classified)]


@contextmanager
def figure(
    path: Path, columns: int, *, rows: int = 1, width: float = 5.0, height: float = 3.6, legend: bool = True
) -> Iterator[Any]:
    """A figure's axes (rows, columns), saved to `path` at the end; what the first one's marks mean stands above all."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra(error) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (width * columns, height * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        yield axes
        handles, labels = axes[0, 0].get_legend_handles_labels() if legend else ([], [])
        across = max(1, int(20 * width * columns / max(map(len, [*labels, "12345678"])) / 2.4))
        drawn.legend(handles, labels, loc="outside upper center", ncols=across, frameon=False, fontsize=8)
        drawn.savefig(path, dpi=120)
    finally:
        plt.close(drawn)


def draw_lines(axis: Any, groups: Iterable[Group], name: str, *, evaluated: bool = False, mark: str = "") -> bool:
    """Mean over seeds and a band of one standard deviation, for the groups that have `name`; False if none has."""
    drawn = False
    for group in groups:
        steps, values = group.values(name, evaluated=evaluated)
        if not len(steps):
            continue
        mean = values.mean(0)
        marker = mark or (MARKS[group.style % len(MARKS)] if len(steps) < 30 else "")
        label = group.label + (f" ({len(values)} seeds)" if len(values) > 1 else "")
        axis.plot(steps, mean, label=label, marker=marker, markersize=4, linewidth=1.4, **group.line)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            axis.fill_between(steps, mean - spread, mean + spread, color=group.line["color"], alpha=0.15, linewidth=0)
        drawn = True
    if drawn:
        axis.set(xlabel="step", xlim=(0, None))
    return drawn


def draw_curves(groups: list[Group], path: Path) -> None:
    """Training loss, and the loss on held-out pairs where it was evaluated."""
    validated = any("loss" in entry for group in groups for run in group.runs for entry in run.evaluations)
    with figure(path, 1 + validated) as axes:
        draw_lines(axes[0, 0], groups, "loss")
        axes[0, 0].set(ylabel="training loss (nats)")
        if validated:
            draw_lines(axes[0, 1], groups, "loss", evaluated=True)
            axes[0, 1].set(ylabel="validation loss (nats)")


def draw_parts(groups: list[Group], path: Path) -> None:
    """Of the runs that log them: contrastive loss, conditional information, and the estimates of the first group."""
    penalised = [group for group in groups if any("image_cmi" in entry for entry in group.runs[0].log)]
    with figure(path, 4, width=4.2) as axes:
        for axis, (name, title) in zip(axes[0], PARTS.items(), strict=False):
            draw_lines(axis, groups, name)
            axis.set(ylabel=title)
        first, axis = penalised[0], axes[0, 3]
        titles = {**ESTIMATES, **OTHERWISE.get(first.runs[0].config.get("decomposition", "markov"), {})}
        for k, (name, title) in enumerate(titles.items()):
            steps, values = first.values(name)
            look = {"color": COLOURS[k // 2 * 2], "linestyle": LINES[k % 2]}
            axis.plot(steps, values.mean(0), label=title, linewidth=1.4, **look)
        batch = first.runs[0].config["batch_size"]
        axis.axhline(math.log(batch), color="grey", linewidth=1, linestyle=":")
        axis.annotate(f"log {batch}", (0, math.log(batch)), (4, 3), textcoords="offset points", color="grey")
        axis.set(xlabel="step", xlim=(0, None), ylabel="estimated information (nats)")
        axis.set_title(first.label, fontsize=9)
        axis.legend(frameon=False, fontsize=8)


def draw_recall(groups: list[Group], metrics: list[str], path: Path) -> None:
    """What was evaluated over training, a panel a metric."""
    rows = math.ceil(len(metrics) / 3)
    with figure(path, min(3, len(metrics)), rows=rows) as axes:
        for axis, metric in itertools.zip_longest(axes.flat, metrics):
            if metric is None:
                axis.remove()
                continue
            draw_lines(axis, groups, metric, evaluated=True)
            axis.set(ylabel=metric_name(metric), ylim=(0, None))


def draw_ablation(groups: list[Group], metrics: list[str], path: Path) -> None:
    """The last evaluation against lambda, runs without a penalty at 0; mean and standard deviation over seeds."""
    weights = [group.runs[0].config.get("lam", 0.0) for group in groups]
    with figure(path, 1) as axes:
        for k, metric in enumerate(metrics):
            points = [(w, group.last(metric)) for w, group in zip(weights, groups, strict=True)]
            points = sorted(((w, v) for w, v in points if len(v)), key=lambda point: point[0])
            mean = [v.mean() for _, v in points]
            spread = [v.std(ddof=1) if len(v) > 1 else 0 for _, v in points]
            look = {"color": COLOURS[k % len(COLOURS)], "linestyle": LINES[k % len(LINES)], "marker": MARKS[k]}
            axes[0, 0].errorbar([w for w, _ in points], mean, spread, label=metric_name(metric), capsize=3, **look)
        axes[0, 0].set(xlabel="weight λ of the penalty", ylabel="per cent", ylim=(0, None))


def draw_bars(groups: list[Group], metrics: list[str], path: Path) -> None:
    """The final evaluation: a block of bars a metric, a bar a group, its standard deviation over seeds as a whisker."""
    thick = 0.8 / len(groups)
    with figure(path, 1, width=7.0, height=0.8 + len(metrics) * (0.25 + 0.15 * len(groups))) as axes:
        axis = axes[0, 0]
        for k, group in enumerate(groups):
            first = (k - (len(groups) - 1) / 2) * thick
            found = [(m + first, v) for m, metric in enumerate(metrics) if len(v := group.last(metric))]
            mean = [values.mean() for _, values in found]
            spread = [values.std(ddof=1) if len(values) > 1 else 0.0 for _, values in found]
            hatch = HATCHES[k % len(HATCHES)]
            axis.barh(
                [place for place, _ in found],
                mean,
                0.9 * thick,
                xerr=spread if any(spread) else None,
                capsize=2,
                color="white" if hatch else "0.75",
                edgecolor=group.line["color"],
                hatch=hatch,
                label=group.label,
            )
            for (place, _), value, more in zip(found, mean, spread, strict=True):
                end = (value + more, place)
                axis.annotate(f"{value:.1f}", end, (4, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_yticks(
            range(len(metrics)), [metric_name(metric).removesuffix(" (%)") for metric in metrics], fontsize=8
        )
        axis.invert_yaxis()
        axis.set(xlabel="per cent")


def plot_logs(paths: Sequence[Path], out: Path, by_seed: Collection[str] = ()) -> list[Path]:
    """Draws into `out` what the logs of the runs allow and returns the files. Raises UsageError for what is no run."""
    groups = group_runs([read_run(path) for path in paths], by_seed)
    out.mkdir(parents=True, exist_ok=True)
    runs = [run for group in groups for run in group.runs]
    during, final = headline(entry for run in runs for entry in run.evaluations), headline(run.final for run in runs)
    written = [out / "curves.png"]
    draw_curves(groups, written[0])
    if any("image_cmi" in entry for run in runs for entry in run.log):
        draw_parts(groups, out / "parts.png")
        written.append(out / "parts.png")
    if any(len(group.values(m, evaluated=True)[0]) > 1 for group in groups for m in during):
        draw_recall(groups, during, out / "recall.png")
        written.append(out / "recall.png")
    if final and len({run.config.get("lam", 0.0) for run in runs}) > 2:
        draw_ablation(groups, final, out / "lambda.png")
        written.append(out / "lambda.png")
    if final:
        draw_bars(groups, final, out / "final.png")
        written.append(out / "final.png")
    return written
