"""`cibr compare FILE`: configurations on seeds, each with a split of its own, and what their differences are worth.

spec.py         the file
runs.py         training and scoring, resumed and in parallel
scores.py       what a model does on a set, unit by unit
statistics.py   paired differences, bootstrap over units, Holm
table.py        all of it as numbers and as Markdown
picture.py      for `cibr plot`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cibr.compare.runs import Task, left_to_do, run_all, tasks_of, tidy
from cibr.compare.spec import read_spec
from cibr.compare.table import compare, load, markdown
from cibr.run.atomic import only_writer, write_text

__all__ = ["run_comparison"]


def run_comparison(
    file: Path, out: Path, *, jobs: int = 1, keep: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Does the runs of `file` that `out` does not have yet, and writes OUT/compare.json and OUT/compare.md.

    Raises UsageError for what the file or the runs cannot be, KeyboardInterrupt where it was stopped: the same call
    goes on from there.
    """
    spec = read_spec(file)
    tasks = tasks_of(spec, out, keep)
    with only_writer(out):
        left = left_to_do(tasks)
        for task in tasks:
            tidy(task)  # of one that was killed just then
        say(f"{len(tasks)} runs, {len(tasks) - len(left)} of them done; {out}")
        for number, (task, result) in enumerate(run_all(left, jobs), start=len(tasks) - len(left) + 1):
            note(out, task, result)
            primary = result["scores"]["best"].get(spec.metrics[0], float("nan"))
            say(f"{number}/{len(tasks)}  {task.configuration}, seed {task.seed}: {spec.metrics[0]} {primary:.1f}")
            sys.stdout.flush()
        found = compare(spec, load(tasks))
        write_text(out / "compare.json", json.dumps(found, indent=1))
        write_text(out / "compare.md", markdown(found) + "\n")
    return found


def note(out: Path, task: Task, result: dict[str, Any]) -> None:
    """A line of OUT/log.jsonl."""
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "configuration": task.configuration, "seed": task.seed}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({**entry, **{key: result[key] for key in ("seconds", "steps", "scores")}}) + "\n")
