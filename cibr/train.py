"""Training, top to bottom: data, model, objective, optimiser, loop.

A batch depends on the seed and the step alone and the noise on torch's random state, which every checkpoint keeps: a
run stopped anyhow and resumed gives bit for bit the weights of an unbroken one, on the same machine, threads and number
of ranks, when its length is given in steps. (A budget in seconds depends on the clock.)
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cibr.config import TrainConfig
from cibr.data import ConceptSampler, Pairs, augment, load, split
from cibr.errors import UsageError, missing_extra
from cibr.models import MAX_LOG_SCALE, TwoTower
from cibr.models.text import Captions, Vocabulary
from cibr.objectives import OBJECTIVES
from cibr.run import checkpoint
from cibr.run.journal import Journal
from cibr.run.ranks import Ranks, joined

PATIENCE = 50  # steps in a row that may be skipped for a loss that is not finite


@dataclass(frozen=True)
class Outcome:
    step: int
    seconds: float  # of training
    skipped_steps: int  # loss or gradient not finite
    skipped_samples: int  # unreadable
    stopped_by: int | None  # the signal that ended it early


@dataclass
class Counters:
    step: int = 0
    seconds: float = 0.0
    skipped: int = 0


def train(config: TrainConfig, *, resume: bool = False) -> Outcome:
    """Trains, or with `resume` goes on from the run's last checkpoint, until `config`'s steps or seconds are used up.

    Under torchrun every rank takes its rows of each batch and the first one writes; the steps are, up to rounding,
    those of one process with the whole batch. SIGINT and SIGTERM save a checkpoint and end the run after the step at
    hand. A step whose loss or gradient is not finite changes nothing and is counted; RuntimeError after fifty in a row.
    Raises UsageError before any training for what cannot work.
    """
    try:
        import torch.utils.tensorboard
    except ImportError as error:
        raise missing_extra(error) from error
    run = Path(config.out)
    found = checkpoint.find(run)
    if found is not None and not resume:
        raise UsageError(f"{run} holds a run already: --resume goes on with it, another --out starts a new one")
    config = resolve(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with joined(config.device, config.batch_size) as ranks:
        material = prepare(config)
        model = checkpoint.build_model(config, material.vocabulary)
        players = Players(model, OBJECTIVES[config.objective](config, model)).to(config.device)
        optimizer = make_optimizer(config, players.model, players.objective)
        counters = Counters() if found is None else restore(found, config, material.about, players, optimizer)
        ranks.require_same("checkpoints", counters.step)
        stopped_by = loop(config, material, players, optimizer, counters, ranks)
    return Outcome(counters.step, counters.seconds, counters.skipped, material.pairs.skipped, stopped_by)


@dataclass(frozen=True)
class Material:
    """What batches are made of, and what has to be known of the run."""

    pairs: Pairs
    sampler: ConceptSampler
    captions: Captions
    vocabulary: Vocabulary
    about: checkpoint.About

    def batch(self, config: TrainConfig, step: int, part: slice) -> tuple[Tensor, Tensor]:
        """Images (n, 3, size, size) and tokens (n, context_length): the rows `part` of the step's batch."""
        rng = np.random.default_rng((config.seed, step))
        rows = self.sampler.draw(rng)
        images = self.pairs.images[rows[part]].float() / 255
        images = augment(images, rng, part=part, total=len(rows)) if config.augment else images
        return images, self.captions.draw(self.pairs.concept[rows], rng)[part]


def prepare(config: TrainConfig) -> Material:
    """Reads the data and splits it, the same on every rank."""
    pairs = load(Path(config.data), image_size=config.image_size, limit=config.limit)
    parts = split(pairs, config.hold_out, config.unseen_fraction)
    sampler = ConceptSampler(pairs.concept, pairs.rows(parts.seen, parts.train_styles), config.batch_size)
    seen = [pairs.concepts[c] for c in parts.seen]
    vocabulary = Vocabulary.of((text for c in seen for text in (c.label, *c.keywords)), config.context_length)
    about = checkpoint.About(
        config,
        vocabulary.bpe_ids,
        seen=[concept.key for concept in seen],
        train_styles=[pairs.styles[s] for s in parts.train_styles],
        test_styles=[pairs.styles[s] for s in parts.test_styles],
    )
    return Material(pairs, sampler, Captions(pairs.concepts, vocabulary), vocabulary, about)


class Players(nn.Module):
    """The encoders, and the objective with its critics: what one backward trains."""

    def __init__(self, model: TwoTower, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, tokens: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
        """Images (n, 3, size, size) floats in [0, 1], tokens (n, context_length) int64 -> the parts of the loss."""
        image, text = self.model.encode_image(images, precision), self.model.encode_text(tokens)
        return self.objective(image, text, self.model.log_scale.exp())


def restore(
    found: Path, config: TrainConfig, about: checkpoint.About, players: Players, optimizer: torch.optim.Optimizer
) -> Counters:
    """Puts everything back to what it was at the checkpoint `found`. Raises UsageError if it is of another run."""
    saved_about, saved = checkpoint.read_about(found), checkpoint.load_training(found)
    moved = dataclasses.replace(saved_about.config, out=config.out, data=config.data)
    if dataclasses.replace(saved_about, config=moved) != about:
        raise UsageError(
            f"{config.data} or the options are not those {config.out} was started with; it cannot be resumed"
        )
    checkpoint.load_weights(found, players.model)
    players.objective.load_state_dict(saved["objective"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    if config.device == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"])
    return Counters(saved["step"], saved["seconds"], saved["skipped"])


def loop(
    config: TrainConfig,
    material: Material,
    players: Players,
    optimizer: torch.optim.Optimizer,
    counters: Counters,
    ranks: Ranks,
) -> int | None:
    """Takes the steps that are left and counts them; returns the signal that ended it early. The first rank writes."""
    run, precision, part = Path(config.out), getattr(torch, config.precision), ranks.part(config.batch_size)
    called = ranks.share(players)

    def save() -> None:
        if not ranks.first:
            return
        modules = {"objective": players.objective.state_dict(), "optimizer": optimizer.state_dict()}
        rng = {"rng": torch.get_rng_state()}
        if config.device == "cuda":
            rng["cuda_rng"] = torch.cuda.get_rng_state()
        training = {**dataclasses.asdict(counters), **modules, **rng}
        checkpoint.save(run, counters.step, players.model, material.about, training)

    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        journal = None
        if ranks.first:
            run.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(run)
            if counters.step == 0:
                (run / "config.json").write_text(config.to_json())
            journal = stack.enter_context(Journal(run, counters.step, config.steps))
        in_a_row, asked = 0, 0
        while not asked and (done := progress(config, counters.step, counters.seconds)) < 1:
            started = time.perf_counter()
            images, tokens = (t.to(config.device) for t in material.batch(config, counters.step, part))
            factor = min(1.0, (counters.step + 1) / (config.lr_warmup_steps + 1)) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            losses, norm, taken = take_step(called, optimizer, images, tokens, precision, ranks)
            counters.step += 1
            # one clock and one decision for all ranks
            seconds, asked_now = ranks.largest(time.perf_counter() - started, stop[0] if stop else 0)
            counters.seconds, asked = counters.seconds + seconds, int(asked_now)

            in_a_row = 0 if taken else in_a_row + 1
            counters.skipped += not taken
            if in_a_row == PATIENCE:
                raise RuntimeError(
                    f"{PATIENCE} steps in a row without a finite loss and gradient, the last {counters.step}"
                )
            if journal is not None:
                journal.step()
                if not taken:
                    journal.say(f"step {counters.step} skipped: loss {losses['loss']}, gradient norm {norm}")
                if counters.step % config.log_every == 0 or counters.step == 1:
                    entry = {name: value.item() for name, value in losses.items()}
                    scale = players.model.log_scale.exp().item()
                    entry |= {"scale": scale, "lr_factor": factor, "gradient_norm": norm.item()}
                    journal.write(dataclasses.asdict(counters), entry)
            if counters.step % config.save_every == 0:
                save()
        save()
    return asked or None


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with the device and precision that "auto" stands for here."""
    device, precision = config.device, config.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device")
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_amx_tile_supported()
        precision = "bfloat16" if fast else "float32"
    return dataclasses.replace(config, device=device, precision=precision)


def make_optimizer(config: TrainConfig, model: TwoTower, objective: nn.Module) -> torch.optim.AdamW:
    """AdamW in up to four groups: encoders and critics, each with weight decay (matrices, kernels) and without."""
    critic_lr = max(2 * config.lr, 1e-4) if config.critic_lr is None else config.critic_lr
    groups: list[dict[str, Any]] = []
    for module, lr in ((model, config.lr), (objective, critic_lr)):
        for decay, several in ((config.weight_decay, True), (0.0, False)):
            params = [p for p in module.parameters() if (p.ndim > 1) == several]
            if params:
                groups.append({"params": params, "peak_lr": lr, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def take_step(
    players: Players | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,  # (n, 3, size, size) floats in [0, 1]
    tokens: Tensor,  # (n, context_length) int64
    precision: torch.dtype,
    ranks: Ranks = Ranks(),
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """One update of the weights; returns the parts of the loss, the gradient's norm and whether it was taken.

    It is not where loss or gradient is not finite: weights, running statistics and counters are then as before.
    `players` is a `Players`, or what `ranks.share` made of it: loss and gradient are then those of all ranks' rows.
    """
    before = [buffer.clone() for buffer in players.buffers()]
    optimizer.zero_grad()
    losses = players(images, tokens, precision)
    losses["loss"].backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    losses = ranks.mean({name: value.detach() for name, value in losses.items()})
    taken = bool(torch.isfinite(losses["loss"]) and torch.isfinite(norm))
    if taken:
        optimizer.step()
        with torch.no_grad():
            alone = players.module if isinstance(players, DistributedDataParallel) else players
            alone.model.log_scale.clamp_(0, MAX_LOG_SCALE)
    else:
        for buffer, value in zip(players.buffers(), before, strict=True):
            buffer.copy_(value)
    return losses, norm, taken


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """The part of the run that is done, by steps or by seconds, whichever is further."""
    by_steps = step / config.steps if config.steps is not None else 0.0
    by_seconds = seconds / config.seconds if config.seconds is not None else 0.0
    return max(by_steps, by_seconds)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM puts its number into; a second one acts as usual."""
    stop: list[int] = []
    previous: dict[int, Any] = {}

    def ask(number: int, frame: object) -> None:
        stop.append(number)
        signal.signal(number, previous[number])

    for asked in (signal.SIGINT, signal.SIGTERM):
        previous[asked] = signal.signal(asked, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
