"""`cibr table`: runs in the layout of the paper's Tables 1 and 2 (2503.24182), mean and standard error over seeds.

A run is a folder of `cibr prompts`, or one of `cibr train` with evaluation.json, as `cibr evaluate --json` writes it.
Rows are methods, CLIP, CoOp, MaPLe and CIBR first; runs of one method that differ in more than their seed are rows of
their own.  Columns are the sets that there are; what the paper has besides is named, sets of one's own and base-to-new
have tables of theirs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cibr.config import OptimOptions, option, tuples
from cibr.errors import UsageError
from cibr.plots import Group, Run, draw_bars
from cibr.run.journal import flat

METHODS = {"clip": "CLIP", "coop": "CoOp", "maple": "MaPLe", "cibr": "CIBR"}
TABLE_1 = {
    "imagenet": "ImageNet",
    "cifar100": "CIFAR-100",
    "pets": "OxfordPets",
    "caltech101": "Caltech101",
    "dtd": "DTD",
    "sun397": "SUN397",
    "eurosat": "EuroSAT",
}
TABLE_2 = {"coco": "COCO", "flickr30k": "Flickr30K"}
DEPTHS = (1, 5, 10)
HALVES = {"base": "base", "new": "new", "harmonic_mean": "H"}
TITLES = {
    "table-1": "Table 1: zero-shot classification, {}",
    "table-2": "Table 2: retrieval, text to image",
    "classification": "Other sets: classification, {}",
    "retrieval": "Other sets: retrieval, text to image",
    "base-to-new": "Base and new classes, top-1",
}


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    runs: tuple[str, ...] = option((), "runs, or folders of runs", positional=True)
    metric: Literal["top1", "mean_per_class"] = option("top1", "of sets with classes")
    out: str | None = option(None, "folder for a picture of each table, as bars (the paper's Fig. 8)")


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The runs among `paths` and in the folders that are none.  Raises UsageError where there is no run."""
    found: list[Path] = []
    for path in paths:
        inside = (
            [path] if (path / "evaluation.json").is_file() else sorted(p.parent for p in path.glob("*/evaluation.json"))
        )
        if not inside:
            raise UsageError(
                f"{path} holds no evaluation.json, nor does a folder in it; `cibr prompts` and "
                "`cibr evaluate --checkpoint RUN --json RUN/evaluation.json` write it"
            )
        found += [run for run in inside if run not in found]
    return found


def read(path: Path) -> tuple[str, Run]:
    """The method of a run, and the run with what makes a row of a table for configuration.

    All evaluation*.json count.  What row it is says row.json, and config.json of a run that `cibr prompts` did not
    write.  Raises UsageError for files that are not a run's.
    """
    scores: dict[str, float] = {}
    try:
        for file in sorted(path.glob("evaluation*.json")):
            evaluation = json.loads(file.read_text())
            if not isinstance(evaluation.get("zero_shot"), dict):
                raise ValueError("it has no scores")
            scores |= flat({part: evaluation.get(part, {}) for part in ("zero_shot", "retrieval", "base_to_new")})
        file = path / "row.json" if (path / "row.json").is_file() else path / "config.json"
        row = json.loads(file.read_text())
        method, setting = (row["method"], row["setting"]) if "method" in row else (row["objective"], None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is not what cibr prompts, train or evaluate writes: {error}") from error
    return method, Run(path, setting or {"base": described(row)}, [], [], scores)


def described(config: Mapping[str, Any]) -> str:
    """What seeds of one model have in common, in words: model, objective, and what is not at its default."""
    optim = {field.name: field.default for field in dataclasses.fields(OptimOptions)}
    own = [f"{name} {config[name]}" for name in ("model", "objective") if name in config]
    moved = {
        name: value for name, value in config.items() if name in optim and tuples({name: value})[name] != optim[name]
    }
    penalty = {
        name: value for name, value in config.items() if name.startswith(("lam", "noise", "estimator", "critic_"))
    }
    return ", ".join([*own, *(f"{name} {value}" for name, value in sorted({**moved, **penalty}.items()))])


def rows_of(runs: Iterable[tuple[str, Run]]) -> list[Group]:
    """One for each method, or for each of its settings, labelled by what tells them apart; the paper's come first."""
    by_method: dict[str, dict[str, list[Run]]] = {method: {} for method in METHODS}
    for method, run in sorted(runs, key=lambda one: one[0]):
        by_method.setdefault(method, {}).setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    groups: list[Group] = []
    for method, settings in by_method.items():
        configs = [own[0].config for own in settings.values()]
        names = sorted({name for config in configs for name in config})
        telling = [name for name in names if len({json.dumps(config.get(name)) for config in configs}) > 1]
        for config, own in zip(configs, settings.values(), strict=True):
            details = ", ".join(f"{name.replace('_', ' ')} {config.get(name)}" for name in telling)
            groups.append(Group(METHODS.get(method, method) + (f" ({details})" if details else ""), own, len(groups)))
    return groups


def columns_of(numbers: Iterable[str], metric: str) -> dict[str, dict[str, str]]:
    """{name of a table: {column: name of its number}} of the tables that have any, from the names of all numbers."""
    sets: dict[str, dict[str, None]] = {"zero_shot": {}, "retrieval": {}, "base_to_new": {}}
    for number in numbers:
        sets[number.split("/")[0]][number.split("/")[1]] = None
    halved = {f"{name}, {half} classes" for name in sets["base_to_new"] for half in ("base", "new")}
    one = {name: name for name in sets["zero_shot"] if name not in TABLE_1 and name not in halved}
    two = {name: name for name in sets["retrieval"] if name not in TABLE_2}

    def classified(names: Mapping[str, str]) -> dict[str, str]:
        return {title: f"zero_shot/{name}/{metric}" for name, title in names.items() if name in sets["zero_shot"]}

    def searched(names: Mapping[str, str]) -> dict[str, str]:
        there = [(name, title) for name, title in names.items() if name in sets["retrieval"]]
        return {f"{title} R@{k}": f"retrieval/{name}/text_to_image@{k}" for name, title in there for k in DEPTHS}

    halves = {f"{name} {t}": f"base_to_new/{name}/{half}" for name in sets["base_to_new"] for half, t in HALVES.items()}
    found = {
        "table-1": classified(TABLE_1),
        "table-2": searched(TABLE_2),
        "classification": classified(one),
        "retrieval": searched(two),
        "base-to-new": halves,
    }
    return {table: columns for table, columns in found.items() if columns}


def cell(values: np.ndarray) -> str:
    """ "41.3 (0.4)", mean and standard error; of one value without the latter; "-" of none."""
    if not len(values):
        return "-"
    error = f" ({values.std(ddof=1) / len(values) ** 0.5:.1f})" if len(values) > 1 else ""
    return f"{values.mean():.1f}{error}"


def markdown(title: str, groups: Sequence[Group], columns: Mapping[str, str]) -> str:
    """One table; the number of seeds is that of the runs that have any of its numbers."""
    lines = [["", "seeds", *columns]]
    for group in groups:
        found = [group.last(name) for name in columns.values()]
        lines.append([group.label, str(max(map(len, found))), *map(cell, found)])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    rows = (" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join([f"{title}, per cent", "", *(f"| {row} |" for row in rows)])


def absent(numbers: Iterable[str]) -> str:
    """Which of the paper's sets no run has."""
    there = {number.split("/")[1] for number in numbers}
    missing = [title for name, title in {**TABLE_1, **TABLE_2}.items() if name not in there]
    return f"Of the paper's sets there are no numbers for {', '.join(missing)}." if missing else ""


def table(paths: Sequence[Path], *, metric: str = "top1", out: Path | None = None) -> str:
    """The tables of the runs, as text; with `out` each of them also as bars.  Raises UsageError for what is no run."""
    runs = [read(path) for path in find_runs(paths)]
    numbers = dict.fromkeys(number for _, run in runs for number in run.final)
    parts, several = [], False
    for name, columns in columns_of(numbers, metric).items():
        groups = rows_of((method, run) for method, run in runs if set(columns.values()) & set(run.final))
        parts.append(markdown(TITLES[name].format(metric.replace("_", " ").replace("top1", "top-1")), groups, columns))
        several |= any(len(group.runs) > 1 for group in groups)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            draw_bars(groups, list(columns.values()), out / f"{name}.png")
            parts.append(f"As bars, with a standard deviation over seeds: {out / f'{name}.png'}")
    if several:
        parts.append("In brackets the standard error of the mean over seeds.")
    return "\n\n".join(filter(None, [*parts, absent(numbers)]))
