"""A run of `cibr omib`: two stages, a validation now and then, a checkpoint that a later call goes on from.

Batches and noise are functions of seed and step, so a resumed run takes the same steps.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cibr.errors import UsageError
from cibr.omib import tasks
from cibr.omib.bounds import BetaBounds, beta_bounds
from cibr.omib.data import Data, Split, open_data
from cibr.omib.entropy import entropies
from cibr.omib.model import Fusion
from cibr.omib.objective import Omf
from cibr.omib.options import OmibOptions
from cibr.run.atomic import write_text

CHECKPOINT = "checkpoint.pt"


@dataclass
class Run:
    """What a run is made of and where it stands; `log`: an entry a validation."""

    options: OmibOptions
    data: Data
    task: tasks.Task
    model: Fusion
    objective: Omf
    optimizer: torch.optim.Optimizer
    bounds: BetaBounds | None
    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)


def start(options: OmibOptions, data: Data | None = None) -> Run:
    """A new run.  Raises UsageError for options or data that make no sense."""
    if data is None:
        data = open_data(
            options.data, options.task, train=options.train_rows, test=options.test_rows, seed=options.seed
        )
    task = tasks.build(options.task, **({"classes": data.classes} if options.task == "class" else {}))
    data.check(task)
    torch.manual_seed(options.seed)
    sizes = {"hidden": options.hidden, "latent": options.latent, "tokens": options.tokens}
    model = Fusion(data.widths, task, options.method, **sizes)
    beta, bounds = options.beta, None
    if model.method.bottleneck == "none":
        beta = 0.0
    elif beta is None:
        bounds = beta_bounds(*entropies(data.train.views, options.entropy, options.seed))
        beta = bounds.upper
    objective = Omf(task, model.method, beta=beta, ratio=options.ratio)
    with torch.no_grad():
        model.eval()
        seen = model(data.train.batch())
        task.start([seen.fused, *seen.branches])
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    return Run(options, data, task, model, objective, optimizer, bounds)


def advance(run: Run, until: int | None = None) -> None:
    """Steps up to `until`, by default to the end, with a validation every `eval_every` and at the end."""
    total = run.options.warm_up_steps * run.model.method.branches + run.options.steps
    for _ in range(run.step, total if until is None else min(until, total)):
        parts = take_step(run)
        run.step += 1
        if run.step % run.options.eval_every == 0 or run.step == total:
            entry: dict[str, Any] = {"step": run.step, **{name: value.item() for name, value in parts.items()}}
            if not math.isfinite(entry["loss"]):
                raise UsageError(f"the loss is not finite at step {run.step}; a smaller --lr or --beta may help")
            if not warming(run, run.step - 1):
                entry |= {
                    name: evaluate(run, split) for name, split in (("val", run.data.val), ("test", run.data.test))
                }
            run.log.append(entry)


def warming(run: Run, step: int) -> bool:
    return run.model.method.branches and step < run.options.warm_up_steps


def rate(run: Run, step: int) -> float:
    """The learning rate of a step, counted from 0: constant in the warm-up, then by `--schedule`."""
    into = step - run.options.warm_up_steps * run.model.method.branches
    if into < 0 or run.options.schedule == "constant":
        return run.options.lr
    return run.options.lr * (1 + math.cos(math.pi * into / run.options.steps)) / 2


def step_seed(run: Run, step: int) -> int:
    """Of a step's rows and noise."""
    return run.options.seed * 1_000_003 + step


def rows_of(run: Run, step: int) -> Tensor:
    """The training rows of a step's batch -> (batch_size,) int64."""
    generator = torch.Generator().manual_seed(step_seed(run, step))
    return torch.randint(len(run.data.train), (run.options.batch_size,), generator=generator)


def take_step(run: Run) -> dict[str, Tensor]:
    """One update -> the parts of the loss."""
    batch = run.data.train.batch(rows_of(run, run.step))
    for group in run.optimizer.param_groups:
        group["lr"] = rate(run, run.step)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(step_seed(run, run.step))
        run.model.train()
        parts = run.objective(run.model(batch, warm_up=warming(run, run.step)), batch)
    run.optimizer.zero_grad()
    parts["loss"].backward()
    run.optimizer.step()
    return {name: value.detach() for name, value in parts.items()}


@torch.no_grad()
def evaluate(run: Run, split: Split) -> dict[str, float]:
    """Of the fused head, with means for codes."""
    run.model.eval()
    batch = split.batch()
    fused = run.model(batch).fused
    return {
        **run.task.metrics(fused, batch["target"]),
        "task_loss": run.task.loss(fused, batch["target"]).mean().item(),
    }


def result(run: Run) -> dict[str, Any]:
    """The test's numbers at the last step, and at the step that validation prefers."""
    seen = [entry for entry in run.log if "val" in entry]
    best = max(seen, key=lambda entry: entry["val"][run.task.measure])
    return {
        "method": run.options.method,
        "beta": run.objective.beta,
        "bounds": None if run.bounds is None else asdict(run.bounds),
        "ceiling": run.data.ceiling,
        "notes": run.data.notes,
        "last": seen[-1]["test"],
        "chosen": best["test"],
        "chosen_step": best["step"],
    }


def train(options: OmibOptions) -> dict[str, Any]:
    """The command: trains, or goes on with, the run in the folder `options.out` and writes its log and result there.

    Raises UsageError where the folder holds a run of other options.
    """
    out = Path(options.out)
    run = start(options)
    if (out / CHECKPOINT).exists():
        load(run, out / CHECKPOINT)
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(asdict(options), indent=1) + "\n")
    total = options.warm_up_steps * run.model.method.branches + options.steps
    while run.step < total:
        advance(run, run.step + options.save_every)
        save(run, out / CHECKPOINT)
    found = result(run)
    write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in run.log))
    write_text(out / "result.json", json.dumps(found, indent=1) + "\n")
    return found


def save(run: Run, path: Path) -> None:
    state = {
        "options": asdict(run.options),
        "step": run.step,
        "log": run.log,
        "model": run.model.state_dict(),
        "task": run.task.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "beta": run.objective.beta,
    }
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(run: Run, path: Path) -> None:
    """Raises UsageError for a checkpoint of other options; with a constant schedule more --steps extend a run."""
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    free = ("out", "save_every", *(("steps",) if run.options.schedule == "constant" else ()))
    saved = {"schedule": "constant", **state["options"]}  # which runs had before there was a choice
    changed = {name: old for name, old in saved.items() if name not in free and getattr(run.options, name) != old}
    if changed:
        raise UsageError(f"{path} is of a run with {', '.join(f'{name} = {old}' for name, old in changed.items())}")
    run.model.load_state_dict(state["model"])
    run.task.load_state_dict(state["task"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.log, run.objective.beta = state["step"], state["log"], state["beta"]
