"""The main job in one command: emoji, the default model with and without the penalty, a table and pictures.

Whatever is there already is kept, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cibr.config import RunConfig
from cibr.data import emoji_build
from cibr.errors import UsageError
from cibr.evaluate import evaluate_run, table
from cibr.pictures import plot
from cibr.run import checkpoint
from cibr.run.atomic import write_text
from cibr.train import train

HELD_OUT = "openmoji"  # the largest gap of style
MORE: dict[str, dict[str, Any]] = {"clip": {}, "cibr": {}}  # options of each run besides the defaults


def demo(out: Path, *, tarballs: Path | None = None, steps: int = 200) -> list[Path]:
    """Writes `out`/{emoji, clip, cibr, table.txt, pictures} and returns the pictures; says what it does.

    The emoji are drawn from npm packages, or from `tarballs`. Raises UsageError for runs of another length there.
    """
    say(f"1/4  emoji of six vendors to {out / 'emoji'}, rendered from npm packages")
    built = emoji_build.build(out / "emoji", tarballs=tarballs)
    say(f"     {built['images']} drawings of {built['concepts']} concepts{'' if built['built'] else ', there already'}")
    for objective in MORE:
        say(f"2/4  {steps} steps of {objective} to {out / objective}; {HELD_OUT} is held out")
        train_run(out / objective, out / "emoji", objective, steps)
    report = {}
    for objective in MORE:
        say(f"3/4  evaluation of {objective}")
        report[objective] = evaluated(out / objective)
    text = "\n\n".join(f"{objective}\n{table(found)}" for objective, found in report.items())
    write_text(out / "table.txt", text + "\n")
    print(f"\n{text}\n")
    say(f"4/4  pictures to {out / 'pictures'}")
    return plot([out / objective for objective in MORE], out / "pictures")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def train_run(run: Path, data: Path, objective: str, steps: int) -> None:
    """Trains or goes on. Raises UsageError when a signal ended it, or the run there is longer."""
    # the default warm-up of 100 steps would leave a short demo without any penalty
    quarter = {"lam_warmup_steps": steps // 4, "lam_ramp_steps": steps // 4} if objective == "cibr" else {}
    options = {
        "data": f"emoji:{data}",
        "hold_out": HELD_OUT,
        "val_split": "held_out",
        "eval_every": max(1, steps // 5),
        "objective": objective,
        "out": str(run),
        "steps": steps,
        **quarter,
        **MORE[objective],
    }
    found = checkpoint.find(run)
    if found is not None and (there := checkpoint.read_about(found)["step"]) >= steps:
        if there > steps:
            raise UsageError(f"{run} has {there} steps already, more than {steps}; another --out starts anew")
        return
    outcome = train(RunConfig.from_dict(options), resume=found is not None)
    if outcome.stopped_by is not None:
        raise UsageError(f"stopped by signal {outcome.stopped_by}; the same command goes on")


def evaluated(run: Path) -> dict[str, Any]:
    """What is in RUN/evaluation.json if it is of the last checkpoint, or a new evaluation, kept there."""
    found, file = checkpoint.find(run), run / "evaluation.json"
    assert found is not None
    if file.is_file() and (report := json.loads(file.read_text()))["step"] == checkpoint.read_about(found)["step"]:
        return report
    report = evaluate_run(run, probe=True)
    write_text(file, json.dumps(report, indent=1) + "\n")
    return report
