"""The file of a comparison: which configurations, on which seeds, read by which metrics.  An example, in YAML:

    base: {model: heads, data: features:x.safetensors, split_by: rows, steps: 120}
    configurations:
      clip: {objective: clip}
      ours: {objective: variance, lam: 0.1, against: clip2}
      tuned: {objective: clip, grid: {lr: [0.001, 0.003], weight_decay: [0, 0.1]}}
    baseline: clip
    seeds: 10
    sets: {test: test, worse: {data: features:y.safetensors, split: test}}
    metrics: [test/text_to_image@1, worse/text_to_image@1]

base            options of `cibr train`, of every run whose objective and model have them
configurations  a name and the options that are its own; a `grid` makes one of each point; `against` names what it is
                compared with instead of the baseline
seeds           a number or a list; each has its own split (`--split-by`), weights and batches
by_seed         options whose value changes with the seed: {hold_out: [noto, fluent]} leaves each vendor out in turn
sets            NAME: a split of the run's data, or an object with `split` and the `data` that it is of
metrics         SET/METRIC; the first is the primary one
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cibr.config import RunConfig, read_options, section_types
from cibr.errors import UsageError

KEYS = ("base", "configurations", "baseline", "seeds", "by_seed", "sets", "metrics")
OURS = ("seed", "split_seed", "out")  # options that the comparison sets


@dataclass(frozen=True)
class Configuration:
    name: str
    options: dict[str, Any]
    against: str  # the configuration that it is compared with; its own name for the baseline


@dataclass(frozen=True)
class Spec:
    base: dict[str, Any]
    configurations: tuple[Configuration, ...]
    baseline: str
    seeds: tuple[int, ...]
    by_seed: dict[str, tuple[Any, ...]]
    sets: dict[str, dict[str, str]]  # by name: "split", and "data" where they are others
    metrics: tuple[str, ...]

    def config(self, configuration: Configuration, seed: int, out: Path) -> RunConfig:
        """Of one run.  Raises UsageError for options that make no sense."""
        ours = {"seed": seed, "split_seed": seed, "out": str(out)}
        turns = {name: values[seed % len(values)] for name, values in self.by_seed.items()}
        known = self.known(configuration)
        base = {name: value for name, value in self.base.items() if name in known}
        return RunConfig.from_dict({**base, **configuration.options, **turns, **ours})

    def known(self, configuration: Configuration) -> set[str]:
        """The options that there are for its model and objective."""
        kinds = section_types({**self.base, **configuration.options})
        return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def read_spec(path: Path) -> Spec:
    """Raises UsageError for what is no such file, with unknown keys by name, before anything runs."""
    values = read_options(path)
    require_known(f"{path}", values, KEYS)
    for name in ("configurations", "baseline", "seeds", "sets", "metrics"):
        if not values.get(name):
            raise UsageError(f"{path} lacks {name}")
    base = mapping(f"base of {path}", values.get("base", {}))
    configurations = tuple(expanded(mapping(f"configurations of {path}", values["configurations"]), values["baseline"]))
    spec = Spec(
        base,
        configurations,
        values["baseline"],
        seeds_of(values["seeds"]),
        turns_of(values.get("by_seed", {})),
        {name: set_of(name, given) for name, given in mapping(f"sets of {path}", values["sets"]).items()},
        tuple(values["metrics"]) if isinstance(values["metrics"], tuple) else (values["metrics"],),
    )
    check(spec)
    return spec


def check(spec: Spec) -> None:
    names = [one.name for one in spec.configurations]
    for name in {spec.baseline, *(one.against for one in spec.configurations)} - set(names):
        raise UsageError(f"there is no configuration {name!r} to compare with; there are {', '.join(names)}")
    if unknown := sorted(set(spec.base) - set().union(*(spec.known(one) for one in spec.configurations))):
        raise UsageError(f"base has the unknown option {', '.join(unknown)}: no configuration here has it")
    for metric in spec.metrics:
        if not isinstance(metric, str) or metric.partition("/")[0] not in spec.sets or "/" not in metric:
            raise UsageError(f"the metric {metric!r} is not SET/METRIC; the sets are {', '.join(spec.sets)}")
    for one in spec.configurations:
        if taken := sorted({*one.options, *spec.base} & {*OURS, *spec.by_seed}):
            raise UsageError(f"{', '.join(taken)} of {one.name}: the comparison sets that itself, by seed")
        if spec.config(one, spec.seeds[0], Path("x")).data.split_by is None and any(
            "data" not in given for given in spec.sets.values()
        ):
            raise UsageError(f"{one.name} has no split_by: a test on its own data needs one, or `data` in `sets`")


def expanded(configurations: dict[str, Any], baseline: str) -> list[Configuration]:
    """With one for each point of a `grid`."""
    found = []
    for name, given in configurations.items():
        options = mapping(f"the configuration {name}", given)
        grid = mapping(f"grid of {name}", options.pop("grid", {}))
        against = options.pop("against", baseline)
        for point in itertools.product(*(tuple(several) for several in grid.values())):
            chosen = dict(zip(grid, point, strict=True))
            label = " ".join([name, *(f"{key}={value}" for key, value in chosen.items())])
            found.append(Configuration(label, {**options, **chosen}, against))
    return found


def mapping(what: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UsageError(f"{what} must be an object of options, got {given!r}")
    return {str(key).replace("-", "_") if what.startswith("base") else str(key): value for key, value in given.items()}


def set_of(name: str, given: Any) -> dict[str, str]:
    found = {"split": given} if isinstance(given, str) else mapping(f"the set {name}", given)
    require_known(f"the set {name}", found, [field.name for field in dataclasses.fields(TestSet)])
    return {"split": "test", **found}


@dataclass(frozen=True)
class TestSet:
    """The keys of a set."""

    split: str
    data: str


def turns_of(given: Any) -> dict[str, tuple[Any, ...]]:
    turns = mapping("by_seed", given)
    for name, values in turns.items():
        if not isinstance(values, list | tuple) or not values:
            raise UsageError(f"by_seed: {name} is {values!r}, but must be a list, a value for each seed in turn")
    return {name: tuple(values) for name, values in turns.items()}


def seeds_of(given: Any) -> tuple[int, ...]:
    seeds = range(given) if isinstance(given, int) else given
    if not len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise UsageError(f"seeds is {given!r}, but must be a number of seeds or a list of them")
    return tuple(seeds)


def require_known(what: str, given: dict[str, Any], known: Any) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(f"{what} has the unknown key {', '.join(unknown)}; known are {', '.join(known)}")
