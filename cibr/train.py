"""Training, top to bottom: data, model, objective, optimiser, loop.

A batch depends on the seed and the step alone and the noise on torch's random state, which every checkpoint keeps: a
run stopped anyhow and resumed gives bit for bit the weights of an unbroken one, on the same machine and threads, when
its length is given in steps. (A budget in seconds depends on the clock.)
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cibr import checkpoint
from cibr.config import TrainConfig
from cibr.data import ConceptSampler, augment, load, split
from cibr.errors import UsageError, missing_extra
from cibr.models import MAX_LOG_SCALE, TwoTower
from cibr.objectives import OBJECTIVES
from cibr.text import Captions, Vocabulary

PATIENCE = 50  # steps in a row that may be skipped for a loss that is not finite


@dataclass(frozen=True)
class Outcome:
    step: int
    seconds: float  # of training
    skipped_steps: int  # loss or gradient not finite
    skipped_samples: int  # unreadable
    stopped_by: int | None  # the signal that ended it early


def train(config: TrainConfig, *, resume: bool = False) -> Outcome:
    """Trains, or with `resume` goes on from the run's last checkpoint, until `config`'s steps or seconds are used up.

    SIGINT and SIGTERM save a checkpoint and end the run after the step at hand. A step whose loss or gradient is not
    finite changes nothing and is counted; RuntimeError after fifty in a row. Raises UsageError before any training
    for what cannot work.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing_extra(error) from error

    run = Path(config.out)
    found = checkpoint.find(run)
    if found is not None and not resume:
        raise UsageError(f"{run} holds a run already: --resume goes on with it, another --out starts a new one")
    config = resolve(config)
    device, precision = torch.device(config.device), getattr(torch, config.precision)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)

    pairs = load(Path(config.data), image_size=config.image_size, limit=config.limit)
    parts = split(pairs, config.hold_out, config.unseen_fraction)
    sampler = ConceptSampler(pairs.concept, pairs.rows(parts.seen, parts.train_styles), config.batch_size)
    seen = [pairs.concepts[c] for c in parts.seen]
    vocabulary = Vocabulary.of((text for c in seen for text in (c.label, *c.keywords)), config.context_length)
    captions = Captions(pairs.concepts, vocabulary)
    about = checkpoint.About(
        config,
        vocabulary.bpe_ids,
        seen=[concept.key for concept in seen],
        train_styles=[pairs.styles[s] for s in parts.train_styles],
        test_styles=[pairs.styles[s] for s in parts.test_styles],
    )

    model = checkpoint.build_model(config, vocabulary).to(device)
    objective = OBJECTIVES[config.objective](config, model).to(device)
    optimizer = make_optimizer(config, model, objective)
    step, seconds, skipped = 0, 0.0, 0
    if found is not None:
        saved_about, saved = checkpoint.read_about(found), checkpoint.load_training(found)
        moved = dataclasses.replace(saved_about.config, out=config.out, data=config.data)
        if dataclasses.replace(saved_about, config=moved) != about:
            raise UsageError(f"{config.data} or the options are not those {run} was started with; it cannot be resumed")
        checkpoint.load_weights(found, model)
        objective.load_state_dict(saved["objective"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"])
        step, seconds, skipped = saved["step"], saved["seconds"], saved["skipped"]
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(run)
    if found is None:
        (run / "config.json").write_text(config.to_json())
    trim_log(run / "log.jsonl", step)

    def save() -> None:
        counters = {"step": step, "seconds": seconds, "skipped": skipped}
        modules = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
        rng = {"rng": torch.get_rng_state()}
        if device.type == "cuda":
            rng["cuda_rng"] = torch.cuda.get_rng_state()
        checkpoint.save(run, step, model, about, {**counters, **modules, **rng})

    in_a_row = 0
    bar = tqdm(total=config.steps, initial=step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30)
    board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
    with stop_signals() as stop, (run / "log.jsonl").open("a", buffering=1) as log, bar, board:
        while not stop and (done := progress(config, step, seconds)) < 1:
            started = time.perf_counter()
            rng = np.random.default_rng((config.seed, step))
            rows = sampler.draw(rng)
            images = pairs.images[rows].float() / 255
            images = augment(images, rng) if config.augment else images
            tokens = captions.draw(pairs.concept[rows], rng)

            factor = min(1.0, (step + 1) / (config.lr_warmup_steps + 1)) * (1 + math.cos(math.pi * done)) / 2
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            losses, norm, taken = take_step(
                model, objective, optimizer, images.to(device), tokens.to(device), precision
            )
            step += 1
            seconds += time.perf_counter() - started

            in_a_row = 0 if taken else in_a_row + 1
            if not taken:
                skipped += 1
                bar.write(f"step {step} skipped: loss {losses['loss']}, gradient norm {norm}", sys.stderr)
            if in_a_row == PATIENCE:
                raise RuntimeError(f"{PATIENCE} steps in a row without a finite loss and gradient, the last {step}")
            bar.update()
            if step % config.log_every == 0 or step == 1:
                entry = {name: value.item() for name, value in losses.items()}
                entry |= {"scale": model.log_scale.exp().item(), "lr_factor": factor, "gradient_norm": norm.item()}
                log.write(json.dumps({"step": step, "seconds": seconds, "skipped": skipped, **entry}) + "\n")
                for name, value in entry.items():
                    board.add_scalar(name, value, step)
                bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items() if name in SHOWN})
            if step % config.save_every == 0:
                save()
        save()
    return Outcome(step, seconds, skipped, pairs.skipped, stop[0] if stop else None)


SHOWN = ("loss", "contrastive_loss", "image_cmi", "text_cmi", "lam", "scale")


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
    model: TwoTower,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,  # (n, 3, size, size) floats in [0, 1]
    tokens: Tensor,  # (n, context_length) int64
    precision: torch.dtype,
) -> tuple[dict[str, Tensor], Tensor, bool]:
    """One update of the weights; returns the parts of the loss, the gradient's norm and whether it was taken.

    It is not where loss or gradient is not finite: weights, running statistics and counters are then as before.
    """
    changing = [buffer for module in (model, objective) for buffer in module.buffers()]
    before = [buffer.clone() for buffer in changing]
    optimizer.zero_grad()
    losses = objective(model.encode_image(images, precision), model.encode_text(tokens), model.log_scale.exp())
    losses["loss"].backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    losses = {name: value.detach() for name, value in losses.items()}
    taken = bool(torch.isfinite(losses["loss"]) and torch.isfinite(norm))
    if taken:
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(0, MAX_LOG_SCALE)
    else:
        for buffer, value in zip(changing, before, strict=True):
            buffer.copy_(value)
    return losses, norm, taken


def progress(config: TrainConfig, step: int, seconds: float) -> float:
    """The part of the run that is done, by steps or by seconds, whichever is further."""
    by_steps = step / config.steps if config.steps is not None else 0.0
    by_seconds = seconds / config.seconds if config.seconds is not None else 0.0
    return max(by_steps, by_seconds)


def trim_log(path: Path, step: int) -> None:
    """Drops the entries after `step`, which a killed run wrote beyond its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    trimmed = path.with_suffix(".tmp")
    trimmed.write_text("".join(kept))
    os.replace(trimmed, path)


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
