"""All that a run is made of: put together, brought back from a checkpoint, saved to one."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cibr import models, objectives, stages
from cibr.config import RunConfig, differences
from cibr.data import Batches, Dataset, open_dataset, training_transform
from cibr.data.stream import Stream
from cibr.errors import UsageError
from cibr.models.batch_norm import over_ranks
from cibr.rates import make_optimizer
from cibr.run import checkpoint
from cibr.run.clock import Clock
from cibr.run.ema import Ema
from cibr.run.journal import Terminal
from cibr.run.ranks import Ranks
from cibr.run.sharding import like, shard, whole
from cibr.step import Players, Taken
from cibr.validation import Validation


@dataclass
class Counters:
    """What a run has come to; `sums` are of what the log shows, over the `count` steps taken since its last entry."""

    step: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float = -1.0  # of the validations' quality
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    steps: int = 0  # since the last entry, skipped ones included
    since: float = 0.0  # seconds at the last entry

    def add(self, taken: Taken, seconds: float) -> None:
        self.step, self.steps, self.seconds = self.step + 1, self.steps + 1, self.seconds + seconds
        if not taken.finite:
            self.skipped += 1
            return
        self.count += 1
        for name, value in taken.parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()


@dataclass
class Session:
    config: RunConfig
    players: Players
    batches: Batches
    validation: Validation | None
    about: dict[str, Any]  # what every checkpoint says of the run
    counters: Counters


def prepare(config: RunConfig, found: Path | None, ranks: Ranks) -> Session:
    """Data, model, objective and optimiser, new or as they were at the checkpoint `found`; the same on every rank."""

    terminal = Terminal(sys.stdout)

    def say(text: str) -> None:
        if ranks.first:
            terminal.write(text + "\n")

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    say(f"data       opening {config.data.data}")  # which takes long where a set is decoded or listed once
    started = time.perf_counter()
    dataset = open_dataset(config.data)
    size = "a stream" if isinstance(dataset, Stream) else f"{len(dataset):,} samples"
    say(f"data       {config.data.data}: {size}, opened in {time.perf_counter() - started:.1f} s")
    fingerprint = dataset.fingerprint()
    saved = None if found is None else checkpoint.read_about(found)
    if saved is None:
        model = models.build(config.model, facts(config, dataset))
    else:
        require_same_run(config, saved, fingerprint)
        model = models.rebuild(config.model, saved["recipe"])
    players = assemble(config, model, ranks, found)
    counters = Counters() if saved is None else Counters(**saved["counters"])
    kind = dataset.augment if config.data.augment == "auto" else config.data.augment
    batches = Batches(
        dataset,
        config.data,
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        transform=training_transform(kind, model.transform) if model.image_key == "image" else None,
        tokenizer=model.tokenizer if model.text_key == "text" else None,
        needs=stages.needs(players.stages),
    )
    validation = Validation(config) if config.run.eval_every is not None else None
    for line in (*description(config, players, batches, counters), *left_out(batches)):
        say(line)
    about = {"config": config.to_dict(), "recipe": model.recipe, "fingerprint": fingerprint}
    return Session(config, players, batches, validation, about, counters)


def left_out(batches: Batches) -> Iterator[str]:
    """What the data's listing has left out, by reason."""
    for line in str(batches.skipped).splitlines():
        yield f"skipped    {line}"


def facts(config: RunConfig, dataset: Dataset) -> models.Facts:
    """What a new model may ask of the data and the objective; SigLIP starts at scale 10 and bias -10 (2303.15343)."""
    chosen = [stage.objective for stage in stages.stages_of(config)]
    sigmoid = any(objectives.OBJECTIVES[options.objective].sigmoid(options) for options in chosen)
    start = {"logit_scale": 10.0, "logit_bias": -10.0} if sigmoid else {}
    return models.Facts(dataset.words(), dataset.image_width, dataset.text_width, dataset.class_names or (), **start)


def require_same_run(config: RunConfig, saved: dict[str, Any], fingerprint: str) -> None:
    """Raises UsageError if a checkpoint is of other options or other data."""
    if saved["format"] != checkpoint.FORMAT:
        raise UsageError(f"{config.run.out} is of an older version, whose runs can be evaluated but not resumed")
    changed = differences(RunConfig.from_dict(saved["config"]).fixed(), config.fixed())
    if changed:
        raise UsageError(f"a resumed run keeps its options, and this one was started with {', '.join(changed)}")
    if saved["fingerprint"] != fingerprint:
        raise UsageError(
            f"{config.data.data} is not the data that {config.run.out} was started with; it cannot be resumed"
        )


def assemble(config: RunConfig, model: models.Model, ranks: Ranks, found: Path | None) -> Players:
    """Everything on its device, in its precision, over its ranks, with the state of the checkpoint `found`."""
    device, precision = config.run.device, config.run.precision
    in_turn = stages.build(config, model, device)
    critics = stages.critics_of(in_turn)
    if found is not None:
        training = checkpoint.load_training(found)
        averaged = checkpoint.load_weights(found)
        model.load_state_dict({**averaged, **taken_from(training, "model.")})
        critics.load_state_dict(taken_from(training, "objective."))
    for parameter in model.temperature():
        if parameter is not None:
            parameter.requires_grad_(config.model.temperature == "learnable")
    model.to(device)
    if precision == "pure_bf16":
        to_bfloat16(model)
    if ranks.group is not None:
        over_ranks(model, ranks.group)
    if config.run.compile:
        model.compile()
    if config.run.fsdp:
        shard(model, device, ranks.world)
    called = model if config.run.fsdp else ranks.copies(model)
    clock = Clock(device)
    for stage in in_turn:
        stage.objective.shards, stage.objective.mark = ranks.shards(config.optim.batch_size), clock.mark
    if config.optim.update == "alternating" and not any(True for _ in critics.parameters()):
        raise UsageError(f"--update alternating: --objective {config.objective.objective} has no critics to move")
    optimizer = make_optimizer(config.optim, model, critics)
    scaler = torch.amp.GradScaler(device, enabled=precision == "amp_fp16")
    ema = None if config.optim.ema is None else Ema(model, config.optim.ema)
    if found is not None:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                state = taken_from(training, f"optimizer.{name}:")
                optimizer.state[p] = {key: t if key == "step" else like(t, p) for key, t in state.items()}
        scaler.load_state_dict(checkpoint.read_about(found)["scaler"])
        if ema is not None:
            ema.values = {name: like(averaged[name], p) for name, p in model.named_parameters()}
    return Players(config, model, called, in_turn, critics, optimizer, scaler, ema, ranks, clock, device)


def to_bfloat16(model: models.Model) -> None:
    """All but the temperature, which would stand still: its steps are smaller than bfloat16's."""
    kept = [(p, p.detach().clone()) for p in model.temperature() if p is not None]
    model.to(torch.bfloat16)
    for p, value in kept:
        p.data = value


def save(session: Session) -> None:
    """The checkpoint of this step; every rank gives its part, the first one writes.  Raises Unwritable on all."""
    players, run = session.players, session.config.run
    weights = {name: whole(t) for name, t in players.model.state_dict().items()}
    training = {f"objective.{name}": t for name, t in players.critics.state_dict().items()}
    for group in players.optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            training |= {f"optimizer.{name}:{key}": whole(t) for key, t in players.optimizer.state[p].items()}
    if players.ema is not None:
        training |= {f"model.{name}": weights[name] for name in players.ema.values}
        weights |= {name: whole(t) for name, t in players.ema.values.items()}
    counters = dataclasses.asdict(session.counters)
    about = {**session.about, "counters": counters, "scaler": players.scaler.state_dict()}
    problem = ""
    if players.ranks.first:
        try:
            checkpoint.save(Path(run.out), session.counters.step, weights, training, about, keep=run.keep)
        except checkpoint.Unwritable as error:
            problem = str(error)
    if players.ranks.largest(bool(problem))[0]:
        raise checkpoint.Unwritable(problem or "the first rank could not write a checkpoint")


def taken_from(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def resolve(config: RunConfig) -> RunConfig:
    """`config` with the device and precision that "auto" stands for here.  Raises UsageError for what is not here."""
    run, device, precision = config.run, config.run.device, config.run.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no CUDA device")
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_amx_tile_supported()
        precision = "amp_bf16" if fast else "fp32"
    if run.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise UsageError("--fsdp shards over the ranks of torchrun, and there is one process only")
    if run.fsdp and precision == "pure_bf16":
        raise UsageError("--fsdp keeps one dtype for all weights: use --precision amp_bf16 with it")
    return dataclasses.replace(config, run=dataclasses.replace(run, device=device, precision=precision))


def description(config: RunConfig, players: Players, batches: Batches, counters: Counters) -> Iterator[str]:
    """What is about to happen, in lines."""
    model, world = players.model, players.ranks.world
    total, moving = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    critics = sum(p.numel() for p in players.critics.parameters())
    yield (
        f"model      {config.model.model}: {total:,} parameters, {moving:,} of them trained; X {model.image_width} and "
        f"{model.text_width}, Z {model.embed_dim} wide"
    )
    yield from (f"           {note}" for note in model.notes)
    named = dict.fromkeys(stage.objective.options.objective for stage in players.stages)
    yield f"objective  {', then '.join(named)}" + (f": critics of {critics:,} parameters" if critics else "")
    device = torch.cuda.get_device_name() if players.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    yield f"device     {device}, {config.run.precision}" + (f", {world} ranks" if world > 1 else "")
    length = f"{config.optim.steps} steps" if config.optim.steps is not None else f"{config.optim.seconds:g} s"
    steps = None if batches.steps_per_epoch is None else batches.steps_per_epoch / config.optim.n_critic
    epoch = "" if steps is None else f", {steps:.4g} steps an epoch"
    batch = f"batches of {config.optim.batch_size}{epoch}"
    start = f", from step {counters.step} on" if counters.step else ""
    yield f"run        {config.run.out}: {length}, {batch}{start}"
    growth = getattr(players.stages[-1].objective, "growth", None)
    if growth is not None and config.optim.steps is not None and growth.warning(config.optim.steps):
        share = growth.at(config.optim.steps - 1).item()
        yield f"           --lam only grows to {share:.0%} in these steps: lower --lam-warmup-steps, --lam-ramp-steps"
    if config.optim.update == "alternating":
        yield f"           critics move in {config.optim.n_critic} turns a step, a batch each, encoders in the last one"
    if config.optim.accumulate > 1 and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        yield "           --accumulate: batch norm sees a part of the batch at a time, everything else the whole"
