"""Training, top to bottom: data, model, objective, optimiser, loop.

A batch, the noise and dropout are functions of the seed and the step alone: a run stopped anyhow and resumed gives bit
for bit the weights of an unbroken one, on the same machine, threads and number of ranks, when its length is given in
steps.  (A budget in seconds depends on the clock.)
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from cibr.config import RunConfig
from cibr.data.batch import dead_workers_in_words
from cibr.errors import UsageError, missing_extra
from cibr.models import Batch
from cibr.objectives import Objective
from cibr.rates import progress, rate
from cibr.run import checkpoint
from cibr.run.atomic import full_disk_in_words, only_writer, write_text
from cibr.run.clock import stop_signals
from cibr.run.environment import environment
from cibr.run.journal import Journal, Silent
from cibr.run.ranks import joined
from cibr.run.sharding import whole
from cibr.session import Session, prepare, resolve, save
from cibr.stages import stage_at
from cibr.step import take_step
from cibr.validation import quality

PATIENCE = 50  # steps in a row that may be skipped for a loss that is not finite


@dataclass(frozen=True)
class Outcome:
    step: int
    seconds: float  # of training
    skipped_steps: int  # loss or gradient not finite
    skipped_samples: str  # unreadable: how many for each reason, a line each
    stopped_by: int | None  # the signal that ended it early
    last: dict[str, Any]  # the last entry of the log


def train(config: RunConfig, *, resume: bool = False) -> Outcome:
    """Trains, or with `resume` goes on from the run's last checkpoint, until `config`'s steps or seconds are used up.

    Under torchrun every rank takes its rows of each batch and the first one writes; the steps are, up to rounding,
    those of one process with the whole batch.  SIGINT, SIGTERM, SIGHUP and a terminal that goes away save a checkpoint
    and end the run after the step at hand.  A step whose loss or gradient is not finite changes nothing and is counted;
    RuntimeError after fifty in a row.  Raises UsageError before any training for what cannot work.
    """
    if find_spec("tensorboard") is None:
        raise missing_extra(ImportError(name="tensorboard"))
    if config.run.wandb is not None and find_spec("wandb") is None:
        raise UsageError("--wandb needs a package that is not installed: pip install wandb")
    config = resolve(config)
    run = Path(config.run.out)
    with ExitStack() as stack:
        stack.enter_context(dead_workers_in_words())  # torch notices wherever the program is
        stack.enter_context(full_disk_in_words("Make room, and --resume goes on from the last checkpoint"))
        ranks = stack.enter_context(joined(config.run.device, config.optim.batch_size, config.run.rank_timeout))
        if ranks.first:
            stack.enter_context(only_writer(run))
            checkpoint.clean(run)
        found = checkpoint.find(run)
        if found is not None and not resume:
            raise UsageError(f"{run} holds a run already: --resume goes on with it, another --out starts a new one")
        ranks.require_same("checkpoints", -1 if found is None else checkpoint.read_about(found)["step"])
        session = prepare(config, found, ranks)
        if ranks.first:
            write_text(run / "config.json", json.dumps(config.to_dict(), indent=1))
            write_text(run / "environment.json", json.dumps(environment(), indent=1))
        stopped_by, last = loop(session)
    counters = session.counters
    skipped = str(session.batches.skipped)
    return Outcome(counters.step, counters.seconds, counters.skipped, skipped, stopped_by, last)


def loop(session: Session) -> tuple[int | None, dict[str, Any]]:
    """Takes the steps that are left; returns the signal that ended it early and the log's last entry."""
    config, players, counters = session.config, session.players, session.counters
    last: dict[str, Any] = {}
    in_a_row, asked, warned = 0, 0, False
    done = progress(config.optim, counters.step, counters.seconds)
    with stop_signals() as stop, open_journal(session, done) as journal:
        turns = config.optim.n_critic
        made = session.batches.start(counters.step * turns, players.ranks.part(config.optim.batch_size))
        while not asked and done < 1:
            started = time.perf_counter()
            players.clock.mark("data")
            batches = [to_device(batch, players.device) for batch in islice(made, turns)]
            players.clock.mark("towers")
            stage, stage_ends = stage_at(players.stages, counters.step)
            factor = stage.factor * rate(config.optim, counters.step, done)
            for group in players.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            taken = take_step(players, stage, batches, counters.step)
            players.clock.mark("other")
            # one clock and one decision for all ranks
            seconds, asked_now = players.ranks.largest(
                time.perf_counter() - started, stop[0] if stop else journal.stopped
            )
            asked = int(asked_now)
            counters.add(taken, seconds)
            done = progress(config.optim, counters.step, counters.seconds)

            in_a_row = 0 if taken.finite else in_a_row + 1
            if not taken.finite:
                journal.say(f"step {counters.step} skipped: loss or gradient not finite ({taken.numbers()})")
            if in_a_row == PATIENCE:
                raise RuntimeError(f"{PATIENCE} steps in a row without a finite loss and gradient; {taken.numbers()}")
            if counters.step % config.run.log_every == 0 or counters.step == 1 or stage_ends or done >= 1:
                last = entry_of(session)
                journal.write(counters.step, last)
                if not warned and (text := stage.objective.warning(last, config.optim.batch_size)):
                    warned = True
                    journal.say(text)
            journal.step(counters.step, done)
            if config.run.eval_every is not None and (counters.step % config.run.eval_every == 0 or done >= 1):
                evaluate(session, stage.objective, journal)
            if counters.step % config.run.save_every == 0 or done >= 1 or asked:
                save(session)
    session.batches.share(players.ranks.union)
    return asked or None, last


def to_device(batch: Batch, device: str) -> Batch:
    return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


def open_journal(session: Session, done: float) -> Silent:
    """The first rank's; others have one that writes nothing."""
    run = session.config.run
    if not session.players.ranks.first:
        return Silent()
    return Journal(Path(run.out), session.counters.step, done, session.config.to_dict(), run.wandb)


def entry_of(session: Session) -> dict[str, Any]:
    """What the log says now: means over the steps since its last entry, and where their time went."""
    counters, players = session.counters, session.players
    session.batches.share(players.ranks.union)
    means = {name: value / max(1, counters.count) for name, value in counters.sums.items()}
    rows = session.config.optim.batch_size * session.config.optim.n_critic * counters.steps
    scale, bias = players.model.temperature()
    entry = {
        "seconds": counters.seconds,
        "samples_per_second": rows / max(1e-9, counters.seconds - counters.since),
        "lr": players.optimizer.param_groups[0]["lr"],
        "skipped": counters.skipped,
        "skipped_samples": session.batches.skipped.total,
        **means,
        "scale": whole(scale.detach()).exp().item(),
        "share_of_time": players.clock.shares(),
    }
    counters.sums, counters.count, counters.steps, counters.since = {}, 0, 0, counters.seconds
    return entry if bias is None else {**entry, "bias": whole(bias.detach()).item()}


def evaluate(session: Session, objective: Objective, journal: Silent) -> None:
    """Writes what the model does on the validation data, and whether it is the best so far."""
    assert session.validation is not None
    players, run = session.players, Path(session.config.run.out)
    with players.autocast(), nullcontext() if players.ema is None else players.ema.in_place():
        report = session.validation(players.model, objective)
    step, mark = session.counters.step, quality(report)
    journal.write(step, {"eval": report})
    journal.say(f"step {step}: validation loss {report['loss']:.4f}, R@1 {mark:.1f}")
    if players.ranks.first and mark > session.counters.best:
        write_text(run / "best.json", json.dumps({"step": step, "quality": mark}))
        session.counters.best = mark
