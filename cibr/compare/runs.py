"""The runs of a comparison: one folder each, resumed where they stopped, in as many processes as asked for.

OUT/CONFIGURATION/seed-3/   a run as of `cibr train`; result.json and units.npz when it is over; output.txt
OUT/log.jsonl               a line for each run that was done: when, how long, what came out
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cibr.compare.scores import Scores, score
from cibr.compare.spec import Spec
from cibr.config import RunConfig
from cibr.errors import UsageError
from cibr.evaluate.report import Set, check_weights, use_prompts
from cibr.run import checkpoint
from cibr.run.atomic import write_text
from cibr.train import train

START = "spawn"  # of processes: a fork of one that has computed may hang
POINTS = ("best", "last")  # the step that validation chose, and the run's last


@dataclass(frozen=True)
class Task:
    configuration: str
    seed: int
    config: RunConfig
    sets: dict[str, dict[str, str]]
    keep: bool  # the checkpoints

    @property
    def folder(self) -> Path:
        return Path(self.config.run.out)


def tasks_of(spec: Spec, out: Path, keep: bool) -> list[Task]:
    """Seed by seed, so that what is there after half of the time is a whole comparison on fewer seeds."""
    return [
        Task(one.name, seed, spec.config(one, seed, out / folder_name(one.name) / f"seed-{seed}"), spec.sets, keep)
        for seed in spec.seeds
        for one in spec.configurations
    ]


def folder_name(name: str) -> str:
    """`clip lr=0.001` -> `clip_lr=0.001`."""
    return re.sub(r"[^\w.=+-]+", "_", name)


def left_to_do(tasks: Sequence[Task]) -> list[Task]:
    """Those without a result.  Raises UsageError for a result of other options."""
    left = []
    for task in tasks:
        found = task.folder / "result.json"
        if not found.is_file():
            left.append(task)
        elif json.loads(found.read_text())["options"] != plain(task):
            raise UsageError(f"{task.folder} is a run of other options; choose another --out, or remove that folder")
    return left


def plain(task: Task) -> dict[str, Any]:
    """What decides a run's result, as JSON has it."""
    return json.loads(json.dumps({**task.config.fixed(), "data": task.config.data.data, "sets": task.sets}))


def run_all(tasks: Sequence[Task], jobs: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Does them, in this process or in `jobs` others; yields each with its result.  Raises a run's UsageError."""
    if jobs == 1:
        yield from ((task, run_one(task)) for task in tasks)
        return
    context = multiprocessing.get_context(START)
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_one, task): task for task in tasks}
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_one(task: Task) -> dict[str, Any]:
    """Trains to the end, from where it was, scores, and leaves result.json.  KeyboardInterrupt after a signal."""
    task.folder.mkdir(parents=True, exist_ok=True)
    began, wall = time.process_time(), time.perf_counter()
    with (task.folder / "output.txt").open("a") as said, both_to(said):
        outcome = train(task.config, resume=True)
    if outcome.stopped_by is not None:
        raise KeyboardInterrupt
    seconds = {"training": time.process_time() - began, "wall": time.perf_counter() - wall}
    sets = open_sets(task)
    scored = {point: score_point(path, sets) for point, path in points(task.folder).items()}
    np.savez_compressed(task.folder / "units.npz", **arrays(scored))  # type: ignore[arg-type]
    result = {
        "options": plain(task),
        "seconds": seconds,
        "steps": {point: int(path.name.rpartition("-")[2]) for point, path in points(task.folder).items()},
        "scores": {point: percents(of_sets) for point, of_sets in scored.items()},
    }
    write_text(task.folder / "evaluation.json", json.dumps(as_evaluation(result["scores"][POINTS[0]]), indent=1))
    write_text(task.folder / "result.json", json.dumps(result, indent=1))
    tidy(task)
    return result


def tidy(task: Task) -> None:
    """Drops the weights of a run that has been scored, unless they are to be kept."""
    if not task.keep and (task.folder / "result.json").is_file():
        shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def both_to(file: Any) -> Iterator[None]:
    """What a run says, and its bar, go to a file."""
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def open_sets(task: Task) -> dict[str, Set]:
    found = {}
    for name, given in task.sets.items():
        data = task.config.data
        found[name] = Set(dataclasses.replace(data, data=given.get("data", data.data)), given["split"])
        if found[name].dataset.class_names is not None:
            use_prompts(name, found[name].dataset)
    return found


def points(run: Path) -> dict[str, Path]:
    """The checkpoints that are scored, those of POINTS; without validation both are the last one."""
    last = checkpoint.find(run)
    assert last is not None
    best = checkpoint.read_best(run)
    chosen = last.parent / f"step-{best:08d}" if best is not None else last
    if not chosen.is_dir():
        raise UsageError(f"{run}: the best step {best} was not saved; let save_every divide eval_every")
    return dict(zip(POINTS, (chosen, last), strict=True))


def score_point(path: Path, sets: dict[str, Set]) -> dict[str, Scores]:
    model = checkpoint.load_run(path).model
    check_weights(model)
    return {name: score(model, chosen) for name, chosen in sets.items()}


def percents(scored: dict[str, Scores]) -> dict[str, float]:
    """{"SET/METRIC": per cent}."""
    return {f"{name}/{metric}": value for name, one in scored.items() for metric, value in one.percent().items()}


def arrays(scored: dict[str, dict[str, Scores]]) -> dict[str, np.ndarray]:
    """What units.npz holds: `units SET`, and by point and metric `hits POINT SET/METRIC`, `asked POINT SET/METRIC`."""
    found: dict[str, np.ndarray] = {}
    for point, of_sets in scored.items():
        for name, one in of_sets.items():
            found[f"units {name}"] = np.array(one.units)
            for metric in one.hits:
                found[f"hits {point} {name}/{metric}"] = one.hits[metric]
                found[f"asked {point} {name}/{metric}"] = one.asked[metric]
    return found


def as_evaluation(scores: dict[str, float]) -> dict[str, Any]:
    """As `cibr evaluate --json` writes it, for `cibr plot`."""
    found: dict[str, Any] = {"zero_shot": {}, "retrieval": {}}
    for name, value in scores.items():
        of, metric = name.split("/")
        kind = "retrieval" if "@" in metric else "zero_shot"
        found[kind].setdefault(of, {})[metric] = value
    return found
